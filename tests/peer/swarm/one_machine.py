"""A single round machine of one of three members, and what others say to it."""

from typing import Any

from peer.swarm import round_types as rt
from peer.swarm.round_proposer import leader_of
from peer.swarm.round_state import RoundMachine
from protos.muster.v1 import common_pb2, rounds_pb2
from tests.peer.swarm.round_simulation import TIMING, Checks

PEERS = ("peer0", "peer1", "peer2")
LEADER = leader_of(
    [common_pb2.RosterEntry(peer_id=p, has_vote=True) for p in PEERS],
    incarnation=1,
    outer_step=1,
    attempt=0,
)
OTHERS = tuple(p for p in PEERS if p != LEADER)


def machine_of(
    own: str,
    *,
    is_paused: bool = False,
    record: rt.RoundRecord | None = None,
    left_out: frozenset[str] = frozenset(),
    timing: rt.RoundTiming = TIMING,
    hidden: frozenset[str] = frozenset(),
    peers: tuple[str, ...] = PEERS,
) -> RoundMachine:
    """A member's machine of step 1, which has just begun; the hidden accept no connections."""
    roster = [
        common_pb2.RosterEntry(
            peer_id=p, has_vote=True, round_tokens=10, can_accept_connections=p not in hidden
        )
        for p in peers
    ]
    directive = common_pb2.Directive(
        incarnation=1, directive_number=1, roster=roster, is_paused=is_paused
    )
    setup = rt.RoundSetup(
        run_id="sim",
        incarnation=1,
        outer_step=1,
        own_peer_id=own,
        directive=directive,
        previous_state_digest=b"state 0",
        num_pieces=2,
        left_out=left_out,
    )
    return RoundMachine(
        setup=setup,
        checks=Checks(own, directive),
        timing=timing,
        record=record or rt.RoundRecord(incarnation=1, outer_step=1),
        newest_directive=common_pb2.Signed(payload=directive.SerializeToString()),
        now_seconds=0.0,
    )


def own_of(peer: str, windows: int = 10) -> rt.OwnContribution:
    """What a member brings."""
    ranges = [rounds_pb2.LeasedRange(end_window=windows)] if windows else []
    contribution = rounds_pb2.Contribution(peer_id=peer, ranges=ranges)
    return rt.OwnContribution(contribution=contribution, piece_digests=(b"d",) * 2 * bool(windows))


def join_of(peer: str, *, windows: int = 10, state: bytes = b"state 0") -> rt.Received:
    """A member asks the leader in."""
    own = own_of(peer, windows)
    join = rounds_pb2.JoinGroup(
        previous_state_digest=state,
        contribution=own.contribution,
        piece_digests=own.piece_digests,
        newest_directive=common_pb2.Signed(
            payload=common_pb2.Directive(incarnation=1, directive_number=1).SerializeToString()
        ),
    )
    return rt.Received(peer, message_of(join_group=join))


def message_of(*, outer_step: int = 1, attempt: int = 0, **body: Any) -> rounds_pb2.RoundMessage:
    """A message of this step."""
    return rounds_pb2.RoundMessage(incarnation=1, outer_step=outer_step, attempt=attempt, **body)


def of_kind(effects: list[rt.Effect], kind: type[Any]) -> list[Any]:
    """Those of the effects."""
    return [effect for effect in effects if isinstance(effect, kind)]


def leader_at(attempt: int) -> str:
    """Who leads an attempt."""
    roster = [common_pb2.RosterEntry(peer_id=p, has_vote=True) for p in PEERS]
    return leader_of(roster, incarnation=1, outer_step=1, attempt=attempt)


def value_of(run_id: str = "sim", digest: bytes = b"") -> bytes:
    """A value that could be voted for."""
    value = rounds_pb2.RoundValue(
        run_id=run_id,
        incarnation=1,
        outer_step=1,
        roster_directive_number=1,
        averaged_digest=digest,
        previous_state_digest=b"state 0",
    )
    return value.SerializeToString()


def members_of(effects: list[rt.Effect]) -> set[str]:
    """Of the group that is to average."""
    return {m.contribution.peer_id for m in of_kind(effects, rt.StartReduce)[0].group.members}
