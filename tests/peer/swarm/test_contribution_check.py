"""Leases behind a contribution: each rule refused on its own, with a reason."""

import tracemalloc
from dataclasses import replace

import pytest

from peer.swarm.contribution_check import (
    LeaseRules,
    SignedChecks,
    check_contribution,
    cursors_after,
    next_meta,
)
from protos.contract.certificate import Tag
from protos.contract.digest import StateMeta
from protos.contract.signing import SigningKey
from protos.muster.v1 import common_pb2, rounds_pb2

COORDINATOR, PEER = SigningKey.generate(), SigningKey.generate()
RULES = LeaseRules(
    run_id="run",
    incarnation=2,
    directive=common_pb2.Directive(
        roster=[common_pb2.RosterEntry(peer_id=PEER.peer_id, max_round_tokens=160)]
    ),
    cursor_by_peer={PEER.peer_id: (4, 10)},
    seq_len=8,
    coordinator_public_key=COORDINATOR.public_key,
)


def _range(
    number: int,
    begin: int,
    end: int,
    *,
    key: SigningKey = COORDINATOR,
    incarnation: int = 2,
    peer_id: str = PEER.peer_id,
) -> rounds_pb2.LeasedRange:
    lease = common_pb2.Lease(
        run_id="run",
        incarnation=incarnation,
        peer_id=peer_id,
        lease_number=number,
        range=common_pb2.WindowRange(begin_window=0, end_window=16),
    )
    signed = key.signed(Tag.LEASE, lease.SerializeToString())
    return rounds_pb2.LeasedRange(lease=signed, begin_window=begin, end_window=end)


def _verdict(*ranges: rounds_pb2.LeasedRange) -> tuple[int, str]:
    contribution = rounds_pb2.Contribution(peer_id=PEER.peer_id, ranges=ranges)
    verdict = check_contribution(contribution, RULES)
    return verdict.num_tokens, verdict.reason


def test_tokens_are_counted_from_windows() -> None:
    assert _verdict(_range(4, 10, 16), _range(5, 0, 4)) == (80, "")
    assert _verdict() == (0, "")


@pytest.mark.parametrize(
    ("ranges", "reason"),
    [
        ([_range(5, 0, 4, key=PEER)], "not signed by the coordinator"),
        ([_range(5, 0, 4, incarnation=1)], "not for this peer and incarnation"),
        ([_range(5, 0, 4, peer_id="0" * 32)], "not for this peer and incarnation"),
        ([_range(5, 4, 4)], "not inside lease"),
        ([_range(5, 12, 17)], "not inside lease"),
        ([_range(4, 9, 12)], "not above the cursor"),
        ([_range(3, 12, 14)], "not above the cursor"),
        ([_range(5, 0, 4), _range(5, 3, 6)], "not above the cursor"),
        ([_range(6, 0, 4), _range(5, 4, 6)], "not above the cursor"),
        ([_range(5, 0, 16), _range(6, 0, 5)], "at most 160 are allowed"),
    ],
)
def test_broken_rules_are_named(ranges: list[rounds_pb2.LeasedRange], reason: str) -> None:
    num_tokens, found = _verdict(*ranges)
    assert num_tokens == 0
    assert reason in found


def test_strangers_weigh_nothing() -> None:
    contribution = rounds_pb2.Contribution(peer_id="0" * 32)
    assert "not in roster" in check_contribution(contribution, RULES).reason


def test_bookkeeping_after_a_certificate() -> None:
    contributions = rounds_pb2.Contributions(
        contributions=[
            rounds_pb2.Contribution(
                peer_id=PEER.peer_id, ranges=[_range(4, 10, 16), _range(5, 0, 4)]
            ),
            rounds_pb2.Contribution(peer_id="f" * 32),
        ]
    )
    value = rounds_pb2.RoundValue(incarnation=2, outer_step=8, next_directive_number=9)
    certificate = rounds_pb2.Certificate(
        value=value.SerializeToString(), contributions=contributions.SerializeToString()
    )
    meta = StateMeta(
        run_digest="d",
        incarnation=2,
        outer_step=7,
        schedule_tokens=1000,
        directive_number=3,
        lease_cursor_by_peer={PEER.peer_id: (4, 10), "other": (1, 1)},
    )
    after = next_meta(meta, certificate, seq_len=8)
    cursors = {PEER.peer_id: (5, 4), "other": (1, 1)}
    expected = replace(
        meta,
        outer_step=8,
        schedule_tokens=1080,
        directive_number=9,
        lease_cursor_by_peer=cursors,
    )
    assert after == expected
    assert cursors_after(contributions, {}) == {PEER.peer_id: (5, 4)}


def test_what_was_checked_is_not_kept() -> None:
    """A message may be large, and of no use."""
    checks, num_bytes = SignedChecks(key=PEER, rules=RULES), 2**20
    tracemalloc.start()
    for number in range(32):
        junk = bytes([number]) * num_bytes
        assert checks.check_directive(common_pb2.Signed(payload=junk)) is None
        leased = rounds_pb2.LeasedRange(lease=common_pb2.Signed(payload=junk))
        bad = rounds_pb2.Contribution(peer_id=PEER.peer_id, ranges=[leased])
        assert checks.check_contribution(bad).reason
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 4 * num_bytes
