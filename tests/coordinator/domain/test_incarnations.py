"""Bootstrap, the need of a new incarnation, and the choice of its base."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.domain.incarnations import (
    Base,
    Holding,
    IncarnationPlan,
    Need,
    chain_segments,
    check_need,
    has_quorum,
    is_attested_by_quorum,
    is_on_chain,
    plan_bootstrap,
    plan_rollback,
    voters_of_base,
)
from coordinator.domain.membership import Member
from coordinator.domain.policy import SwarmPolicy
from protos.contract.telemetry import PeerState

POLICY = SwarmPolicy()
NOW = 10_000.0


def digest(incarnation: int, outer_step: int) -> bytes:
    return b"%016d%016d" % (incarnation, outer_step)


def member(
    peer_id: str,
    state: PeerState = PeerState.VOTER,
    *,
    attested: tuple[int, int] | None = (1, 120),
    joined_ago: float = 5000.0,
    silent_for: float = 1.0,
    is_sure: bool = False,
    state_digest: bytes | None = None,
) -> Member:
    incarnation, outer_step = attested or (-1, 0)
    return Member(
        peer_id=peer_id,
        state=state,
        state_reason="",
        join_unix_seconds=NOW - joined_ago,
        last_heartbeat_unix_seconds=NOW - silent_for,
        has_vote=state is PeerState.VOTER,
        attested_incarnation=incarnation,
        attested_outer_step=outer_step,
        attested_digest=(state_digest or digest(incarnation, outer_step)) if attested else b"",
        is_gone_for_sure=is_sure,
    )


@pytest.mark.parametrize(
    ("voters", "present", "is_enough"),
    [
        ("", "", False),
        ("a", "a", True),
        ("a", "", False),
        ("ab", "a", True),
        ("abc", "a", False),
        ("abc", "ab", True),
        ("abcd", "ab", True),
        ("abcd", "a", False),
        ("abcd", "abx", True),
    ],
)
def test_quorum_with_the_coordinators_half(voters: str, present: str, is_enough: bool) -> None:
    assert has_quorum(frozenset(voters), frozenset(present)) is is_enough


def test_attestations_prove_without_the_half() -> None:
    assert is_attested_by_quorum(frozenset("a"), frozenset("a"))
    assert not is_attested_by_quorum(frozenset("ab"), frozenset("a"))
    assert is_attested_by_quorum(frozenset("abc"), frozenset("ab"))
    assert not is_attested_by_quorum(frozenset(), frozenset("a"))


def test_the_chain_follows_bases_and_leaves_rolled_back_states_out() -> None:
    segments = chain_segments([(0, 0, 0), (1, 0, 0), (2, 100, 1), (3, 80, 1)])
    assert [s.incarnation for s in segments] == [3, 1, 0]
    assert is_on_chain(segments, incarnation=1, outer_step=80)
    assert not is_on_chain(segments, incarnation=1, outer_step=81)
    assert not is_on_chain(segments, incarnation=2, outer_step=100)
    assert is_on_chain(segments, incarnation=3, outer_step=500)
    assert not is_on_chain(segments, incarnation=3, outer_step=79)


# Bootstrap.


def newcomer(peer_id: str, state_digest: bytes = b"x" * 32) -> Member:
    return member(peer_id, PeerState.JOINED, attested=(0, 0), state_digest=state_digest)


def bootstrap(members: list[Member], *, min_peers: int, waited: float = 1.0) -> IncarnationPlan:
    return plan_bootstrap(
        members,
        attest_unix_seconds_by_peer={m.peer_id: NOW - waited for m in members},
        min_peers=min_peers,
        now_unix_seconds=NOW,
        policy=POLICY,
    )


def test_bootstrap_waits_for_peers_and_then_for_the_grace() -> None:
    idle = member("a", PeerState.JOINED, attested=None)
    assert "none has built" in bootstrap([idle], min_peers=1).reason
    plan = bootstrap([newcomer("a")], min_peers=2)
    assert plan.base is None and "1 of at least 2" in plan.reason and "59 s" in plan.reason
    plan = bootstrap([newcomer("a")], min_peers=2, waited=60.0)
    assert plan.base is not None and plan.base.holders == {"a"}
    plan = bootstrap([newcomer("a"), newcomer("b")], min_peers=2)
    assert plan.base == Base(
        incarnation=0, outer_step=0, state_digest=b"x" * 32, holders=frozenset("ab")
    )


def test_bootstrap_refuses_the_minority_with_the_reason() -> None:
    plan = bootstrap([newcomer("a"), newcomer("b"), newcomer("c", b"y" * 32)], min_peers=2)
    assert plan.base is not None and plan.base.holders == {"a", "b"}
    assert "2 of 3" in plan.refused["c"]
    plan = bootstrap([newcomer("a"), newcomer("c", b"y" * 32)], min_peers=2)
    assert plan.base is None, "two different states are not two peers"


# Need.


def need(
    members: list[Member],
    *,
    in_force: str = "abc",
    newest: str | None = None,
    certified_ago: float = 1.0,
    certified: int = 120,
) -> Need:
    return check_need(
        members,
        voters_in_force=frozenset(in_force),
        voters_newest=frozenset(in_force if newest is None else newest),
        current_incarnation=1,
        certified_outer_step=certified,
        certify_unix_seconds=NOW - certified_ago,
        now_unix_seconds=NOW,
        policy=POLICY,
    )


LOST = {"state": PeerState.LOST, "silent_for": 60.0}
EXITED = {"state": PeerState.LOST, "is_sure": True}


@pytest.mark.parametrize(
    ("members", "is_needed", "is_stalled", "reason"),
    [
        ([member("a"), member("b"), member("c")], False, False, "3 voters are live"),
        ([member("a"), member("b"), member("c", **EXITED)], False, False, "2 voters are live"),
        (
            [member("a"), member("b", **EXITED), member("c", **EXITED)],
            True,
            True,
            "seen to be gone",
        ),
        ([member("a"), member("b", **LOST), member("c", **LOST)], True, True, "silent for more"),
        (
            [member("a"), member("b", PeerState.LOST, silent_for=30.0), member("c", **LOST)],
            False,
            True,
            "waits for them",
        ),
        ([member("a"), member("b")], False, False, "2 voters are live"),
        ([member("a")], True, True, "1 of 3 voters"),
    ],
)
def test_need_follows_the_quorum(
    members: list[Member], is_needed: bool, is_stalled: bool, reason: str
) -> None:
    found = need(members)
    assert (found.is_needed, found.is_stalled) == (is_needed, is_stalled)
    assert reason in found.reason


def test_need_looks_at_the_newest_roster_too() -> None:
    members = [member("a"), member("b"), member("d", **EXITED), member("e", **EXITED)]
    found = need(members, in_force="ab", newest="abdef")
    assert found.is_needed and "the newest roster" in found.reason


def restarted(peer_id: str, *, attested: tuple[int, int] | None, ago: float = 5.0) -> Member:
    return member(peer_id, PeerState.VOTER, attested=attested, joined_ago=ago)


@pytest.mark.parametrize(
    ("members", "certified_ago", "is_needed"),
    [
        ([member("a"), member("b", attested=(1, 110))], 1.0, False),
        ([member("a", attested=(1, 119)), member("b", attested=(1, 119))], 1.0, False),
        ([member("a", attested=(1, 119)), member("b", attested=(1, 119))], 61.0, True),
        ([restarted("a", attested=(1, 100)), restarted("b", attested=(1, 90))], 10.0, True),
        ([restarted("a", attested=(1, 100)), restarted("b", attested=None)], 10.0, False),
        ([restarted("a", attested=(1, 100)), restarted("b", attested=None, ago=20.0)], 30.0, True),
        ([restarted("a", attested=(1, 120)), restarted("b", attested=None)], 90.0, False),
        ([restarted("a", attested=(0, 0)), restarted("b", attested=(0, 0))], 10.0, True),
    ],
)
def test_need_when_nobody_holds_the_newest_state(
    members: list[Member], certified_ago: float, is_needed: bool
) -> None:
    found = need(members, in_force="ab", certified_ago=certified_ago)
    assert found.is_needed is is_needed, found.reason


def test_equivocation_needs_a_new_incarnation() -> None:
    found = check_need(
        [member("a")],
        voters_in_force=frozenset("a"),
        voters_newest=frozenset("a"),
        current_incarnation=1,
        certified_outer_step=120,
        certify_unix_seconds=NOW,
        now_unix_seconds=NOW,
        policy=POLICY,
        equivocation_reason="two values",
    )
    assert found.is_needed and "two values" in found.reason


# Rollback.

SEGMENTS = chain_segments([(0, 0, 0), (1, 0, 0)])


def holding(peer_id: str, incarnation: int, outer_step: int, *, ago: float = 100.0) -> Holding:
    return Holding(
        peer_id=peer_id,
        incarnation=incarnation,
        outer_step=outer_step,
        state_digest=digest(incarnation, outer_step),
        since_unix_seconds=NOW - ago,
    )


def rollback(
    holdings: list[Holding],
    members: list[Member],
    *,
    proved: dict[tuple[int, int], bytes] | None = None,
) -> IncarnationPlan:
    return plan_rollback(
        holdings,
        members,
        segments=SEGMENTS,
        certified_outer_step=120,
        digest_proved=lambda i, s: (proved or {}).get((i, s)),
        need_reason="need",
        now_unix_seconds=NOW,
        policy=POLICY,
    )


def test_rollback_takes_the_newest_state_that_is_held() -> None:
    members = [member("a"), member("b", attested=(1, 110))]
    plan = rollback([holding("a", 1, 120), holding("b", 1, 110), holding("", 1, 100)], members)
    assert plan.base is not None
    assert (plan.base.outer_step, plan.base.holders) == (120, frozenset("a"))
    assert "goes back 0 steps" in plan.reason
    assert voters_of_base(plan.base, members) == {"a"}


def test_rollback_takes_a_checkpoint_when_nobody_holds_anything_newer() -> None:
    members = [
        member("a", PeerState.JOINED, attested=None, joined_ago=20.0),
        member("b", PeerState.JOINED, attested=None, joined_ago=20.0),
    ]
    plan = rollback([holding("", 1, 100)], members)
    assert plan.base is not None and not plan.base.holders
    assert "20 steps" in plan.reason and "checkpoint" in plan.reason
    assert voters_of_base(plan.base, members) == {"a", "b"}


def test_rollback_waits_for_peers_joiners_and_certificates() -> None:
    assert "none is live" in rollback([holding("", 1, 100)], [member("a", **LOST)]).reason
    fresh = member("a", PeerState.JOINED, attested=None, joined_ago=5.0)
    assert "may still hold" in rollback([holding("", 1, 100)], [fresh]).reason
    plan = rollback([holding("a", 1, 122, ago=1.0)], [member("a", attested=(1, 122))])
    assert plan.base is None and "121 to 122 are missing" in plan.reason
    plan = rollback(
        [holding("a", 1, 122, ago=20.0), holding("", 1, 100)], [member("a", attested=(1, 122))]
    )
    assert plan.base is not None and plan.base.outer_step == 100
    assert "no live member and no checkpoint" in rollback([], [member("a")]).reason


def test_rollback_refuses_a_state_that_is_not_the_proved_one() -> None:
    wrong = replace(holding("b", 1, 120), state_digest=b"z" * 32)
    proved = {(1, 120): digest(1, 120)}
    plan = rollback([wrong, holding("a", 1, 120)], [member("a"), member("b")], proved=proved)
    assert plan.base is not None and plan.base.holders == {"a"}
    assert "not the proved" in plan.refused["b"]


RECORDS = st.lists(st.integers(0, 6), max_size=4).map(
    lambda steps: [
        (0, 0, 0),
        *((n, 0 if n == 1 else step, n - 1) for n, step in enumerate(steps, 1)),
    ]
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    records=RECORDS,
    held=st.lists(
        st.tuples(st.sampled_from("abc") | st.just(""), st.integers(0, 5), st.integers(0, 9))
    ),
    certified=st.integers(0, 8),
)
def test_a_base_is_held_on_the_chain_and_certified(
    records: list[tuple[int, int, int]], held: list[tuple[str, int, int]], certified: int
) -> None:
    segments = chain_segments(records)
    holdings = [holding(peer, incarnation, step) for peer, incarnation, step in held]
    plan = plan_rollback(
        holdings,
        [member("a"), member("b"), member("c")],
        segments=segments,
        certified_outer_step=certified,
        digest_proved=lambda incarnation, outer_step: None,
        need_reason="need",
        now_unix_seconds=NOW,
        policy=POLICY,
    )
    allowed = [
        (h.outer_step, h.incarnation)
        for h in holdings
        if h.outer_step <= certified
        and is_on_chain(segments, incarnation=h.incarnation, outer_step=h.outer_step)
    ]
    assert (plan.base is None) == (not allowed)
    if plan.base is not None:
        assert (plan.base.outer_step, plan.base.incarnation) == max(allowed)
        assert plan.base.state_digest == digest(plan.base.incarnation, plan.base.outer_step)
