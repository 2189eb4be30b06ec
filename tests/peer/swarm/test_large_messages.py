"""A member that says very much holds nobody up, and is not passed on."""

import pytest

from peer.swarm import round_types as rt
from peer.swarm.part_frames import Refused
from protos.muster.v1 import common_pb2, rounds_pb2
from tests.peer.swarm.one_machine import (
    LEADER,
    OTHERS,
    PEERS,
    join_of,
    machine_of,
    message_of,
    of_kind,
    own_of,
)

_INVALID = rounds_pb2.REFUSAL_KIND_INVALID
_MUCH = 2**20


def _large_join(peer: str) -> rt.Received:
    """Right in all that is checked, with a directive that is large and nobody's."""
    received = join_of(peer)
    directive = common_pb2.Directive(incarnation=1, directive_number=0, run_id="x" * _MUCH)
    received.message.join_group.newest_directive.payload = directive.SerializeToString()
    received.message.join_group.contribution.MergeFromString(b"\xfa\x7f\x80\x80\x40" + bytes(_MUCH))
    return received


def test_a_group_carries_nothing_of_a_join_that_its_members_do_not_need() -> None:
    """One that is too large to be sent would hold up every leader's attempt."""
    machine = machine_of(LEADER)
    machine.handle(rt.Contributed(own_of(LEADER)), now_seconds=0.0)
    machine.handle(_large_join(OTHERS[0]), now_seconds=0.1)
    effects = machine.handle(join_of(OTHERS[1]), now_seconds=0.2)
    group = of_kind(effects, rt.StartReduce)[0].group
    assert [m.contribution.peer_id for m in group.members] == sorted(PEERS)
    assert group.ByteSize() < _MUCH // 100


def test_a_join_with_large_digests_is_refused() -> None:
    machine = machine_of(LEADER)
    received = join_of(OTHERS[0])
    received.message.join_group.piece_digests[1] = bytes(33)
    sent = of_kind(machine.handle(received, now_seconds=0.1), rt.Send)
    assert [s.message.refusal.kind for s in sent] == [_INVALID]


@pytest.mark.parametrize("kind", ["ATTEMPT_FAILED", "SUPERSEDED", "INVALID"])
def test_a_long_reason_is_cut_before_it_is_told_to_anybody(kind: str) -> None:
    machine = machine_of(OTHERS[0])
    machine.handle(rt.Contributed(own_of(OTHERS[0])), now_seconds=0.0)
    refusal = rounds_pb2.RoundRefusal(
        kind=rounds_pb2.RefusalKind.Value(f"REFUSAL_KIND_{kind}"),
        reason="x" * _MUCH,
        attempt=2,
        accused_peer_id=OTHERS[1],
    )
    effects = machine.handle(rt.Received(LEADER, message_of(refusal=refusal)), now_seconds=0.1)
    assert effects and max(len(repr(effect)) for effect in effects) < 10_000
    effects = machine.handle(join_of(OTHERS[1]), now_seconds=0.2)
    assert all(len(repr(effect)) < 10_000 for effect in effects)


def test_a_long_reason_on_a_part_stream_is_cut() -> None:
    assert len(str(Refused("x" * _MUCH))) < 10_000
