"""Which duties are due, who gets them, and that a stale fence never counts."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.domain.duties import (
    MAX_DUTY_ATTEMPTS,
    STATE_KINDS,
    DutyKind,
    DutyRecord,
    DutyState,
    Progress,
    assign,
    check_holder,
    final_duty_id,
    finish,
    forgettable_duties,
    patience_seconds,
    plan_duties,
    recover_duties,
    renew,
    reopen,
    withdraw_outdated,
)
from coordinator.domain.membership import Member
from coordinator.domain.policy import SwarmPolicy
from protos.contract.telemetry import PeerState

POLICY = SwarmPolicy()
PROGRESS = Progress(
    run_id="run",
    incarnation=1,
    outer_step=0,
    credited_tokens=0,
    budget_tokens=800,
    begin_unix_seconds=0.0,
    newest_checkpoint_outer_step=-1,
    newest_checkpoint_unix_seconds=0.0,
)


def member(peer_id: str, *, outer_step: int = 5, state: PeerState = PeerState.VOTER) -> Member:
    return Member(
        peer_id=peer_id,
        state=state,
        state_reason="",
        join_unix_seconds=0.0,
        last_heartbeat_unix_seconds=0.0,
        has_vote=True,
        attested_incarnation=1,
        attested_outer_step=outer_step,
        attested_digest=b"d",
    )


def ids(duties: list[DutyRecord]) -> list[str]:
    return [duty.duty_id for duty in duties]


def due(duties: list[DutyRecord], progress: Progress, now: float = 1.0) -> list[str]:
    found = plan_duties(duties, progress=progress, now_unix_seconds=now, policy=POLICY)
    return ids(found)


def done(duty_id: str, kind: DutyKind, at: float = 1.0) -> DutyRecord:
    return DutyRecord(
        duty_id=duty_id,
        kind=kind,
        state=DutyState.DONE,
        fence=1,
        min_outer_step=0,
        create_unix_seconds=0.0,
        finish_unix_seconds=at,
    )


def test_evaluations_follow_credited_tokens() -> None:
    assert due([], replace(PROGRESS, incarnation=0)) == []
    assert due([], PROGRESS) == ["run/evaluate/0"]
    first = done("run/evaluate/0", DutyKind.EVALUATE)
    assert due([first], replace(PROGRESS, credited_tokens=49)) == []
    parts = {50: "0.5", 75: "0.75", 99: "0.75", 100: "1", 125: "1.25", 199: "1.75", 299: "2"}
    for credited_tokens, part in parts.items():
        moved = replace(PROGRESS, credited_tokens=credited_tokens)
        assert due([first], moved) == [f"run/evaluate/{part}"]
    pending = replace(first, state=DutyState.OPEN)
    assert due([pending], replace(PROGRESS, credited_tokens=100)) == []
    assert due([first], replace(PROGRESS, credited_tokens=350)) == ["run/evaluate/3"]


def test_checkpoints_follow_time_and_need_news() -> None:
    first = done("run/evaluate/0", DutyKind.EVALUATE)
    moved = replace(PROGRESS, outer_step=3)
    assert due([first], moved, now=59.0) == []
    assert due([first], moved, now=60.0) == ["run/checkpoint/1-3"]
    stored = replace(moved, newest_checkpoint_outer_step=3, newest_checkpoint_unix_seconds=60.0)
    both = [first, done("run/checkpoint/1-3", DutyKind.CHECKPOINT, at=60.0)]
    assert due(both, stored, now=300.0) == []
    assert due(both, replace(stored, outer_step=4), now=120.0) == ["run/checkpoint/1-4"]


def test_only_the_newest_checkpoint_duties_are_remembered() -> None:
    many = [done(f"run/checkpoint/1-{n}", DutyKind.CHECKPOINT, at=float(n)) for n in range(10)]
    final = done(final_duty_id("run", DutyKind.CHECKPOINT, 1), DutyKind.CHECKPOINT, at=-1.0)
    assert ids(forgettable_duties([*many, final])) == ["run/checkpoint/1-0", "run/checkpoint/1-1"]


def test_the_end_asks_for_both_once_and_withdraws_others() -> None:
    complete = replace(PROGRESS, outer_step=9, credited_tokens=800)
    pending = replace(done("run/evaluate/7", DutyKind.EVALUATE), state=DutyState.OPEN)
    withdrawn = withdraw_outdated([pending], progress=complete, now_unix_seconds=2.0)
    assert withdrawn[0].state is DutyState.FAILED and "final" in withdrawn[0].reason
    expected = [final_duty_id("run", kind, 1) for kind in STATE_KINDS]
    created = plan_duties(withdrawn, progress=complete, now_unix_seconds=2.0, policy=POLICY)
    assert ids(created) == expected and created[0].min_outer_step == 9
    assert due([*withdrawn, *created], complete) == []
    rolled_back = replace(complete, incarnation=2, credited_tokens=700, outer_step=7)
    lost = withdraw_outdated(created, progress=rolled_back, now_unix_seconds=3.0)
    assert len(lost) == 2


def open_duty(min_outer_step: int = 0) -> DutyRecord:
    return DutyRecord(
        duty_id="run/evaluate/0",
        kind=DutyKind.EVALUATE,
        state=DutyState.OPEN,
        fence=0,
        min_outer_step=min_outer_step,
        create_unix_seconds=0.0,
    )


def give(duties: list[DutyRecord], who: Member) -> DutyRecord | None:
    return assign(duties, who, incarnation=1, now_unix_seconds=10.0)


def test_a_duty_goes_to_one_member_whose_state_serves() -> None:
    assert give([open_duty(6)], member("a", outer_step=5)) is None
    assert give([open_duty()], member("a", state=PeerState.JOINED)) is None
    given_out = give([open_duty(5)], member("a"))
    assert given_out is not None and (given_out.peer_id, given_out.fence) == ("a", 1)
    assert give([given_out], member("b")) is None
    assert give([given_out], member("a")) == given_out, "told again until the result is here"


def recovered(
    duty: DutyRecord, members: list[Member], now: float, *, patience_seconds: float = 600.0
) -> list[DutyRecord]:
    return recover_duties(
        [duty],
        members=members,
        now_unix_seconds=now,
        policy=POLICY,
        patience_seconds_by_duty={duty.duty_id: patience_seconds},
    )


def test_a_holder_that_says_that_it_works_keeps_a_duty_until_no_machine_would_need_longer() -> None:
    held = give([open_duty()], member("a"))
    assert held is not None
    for now in range(100, 1000, 100):
        assert renew([held], duty_id="other", peer_id="a", fence=1, now_unix_seconds=now) is None
        assert (
            renew([held], duty_id="run/evaluate/0", peer_id="b", fence=1, now_unix_seconds=now)
            is None
        )
        assert (
            renew([held], duty_id="run/evaluate/0", peer_id="a", fence=2, now_unix_seconds=now)
            is None
        )
        held = renew([held], duty_id="run/evaluate/0", peer_id="a", fence=1, now_unix_seconds=now)
        assert held is not None
        assert not recovered(held, [member("a")], now + 119.0, patience_seconds=1100.0)
    (silent,) = recovered(held, [member("a")], 1020.0, patience_seconds=1100.0)
    assert "has not said for 120 s" in silent.reason
    (slow,) = recovered(held, [member("a")], 905.0, patience_seconds=800.0)
    assert "gave no result for 895 s" in slow.reason and "would need 800 s" in slow.reason
    assert slow.state is DutyState.OPEN
    assert (
        renew([slow], duty_id="run/evaluate/0", peer_id="a", fence=1, now_unix_seconds=906.0)
        is None
    )
    assert patience_seconds(1.0) == 600.0 and patience_seconds(1e12) == 10_000.0


def test_a_lost_or_silent_holder_is_replaced_and_its_result_refused() -> None:
    held = give([open_duty()], member("a"))
    assert held is not None
    assert not recovered(held, [member("a")], 20.0)
    for members, now in (([member("b")], 20.0), ([member("a"), member("b")], 130.0)):
        free = recovered(held, members, now)[0]
        assert free.state is DutyState.OPEN and free.fence == 1
        second = give([free], member("b"))
        assert second is not None and second.fence == 2
        refused = check_holder(second, peer_id="a", fence=1)
        assert not refused.is_accepted and "fence 1 is stale" in refused.reason
        assert check_holder(second, peer_id="b", fence=2).is_accepted
        over = finish(second, "done", now_unix_seconds=140.0)
        assert not check_holder(over, peer_id="b", fence=2).is_accepted


def test_a_duty_is_given_up_after_some_hand_outs() -> None:
    duty = replace(open_duty(), fence=MAX_DUTY_ATTEMPTS, state=DutyState.ASSIGNED, peer_id="a")
    over = reopen(duty, "no", 1.0)
    assert over.state is DutyState.FAILED and "given up after 5" in over.reason


@settings(max_examples=200, deadline=None, derandomize=True)
@given(events=st.lists(st.tuples(st.sampled_from("gtrlf"), st.sampled_from("ab")), max_size=30))
def test_at_most_one_hand_out_ever_counts(events: list[tuple[str, str]]) -> None:
    """g: the peer asks; t: time passes beyond the TTL; r: it says that it works, under each fence;
    l: the peer is gone; f: it reports under each fence it was given.
    """
    duty, now = open_duty(), 0.0
    fences: dict[str, list[int]] = {"a": [], "b": []}
    accepted = 0
    for event, peer in events:
        if event == "g":
            got = assign([duty], member(peer), incarnation=1, now_unix_seconds=now)
            if got is not None and got.fence != duty.fence:
                assert all(got.fence > fence for known in fences.values() for fence in known)
                fences[peer].append(got.fence)
            duty = got or duty
        elif event == "r":
            for fence in fences[peer]:
                duty = (
                    renew(
                        [duty],
                        duty_id=duty.duty_id,
                        peer_id=peer,
                        fence=fence,
                        now_unix_seconds=now,
                    )
                    or duty
                )
        elif event == "f":
            for fence in fences[peer]:
                if check_holder(duty, peer_id=peer, fence=fence).is_accepted:
                    accepted += 1
                    duty = finish(duty, "done", now_unix_seconds=now)
        else:
            now += POLICY.duty_ttl_seconds if event == "t" else 0.0
            live = [member(p) for p in "ab" if event == "t" or p != peer]
            for changed in recovered(duty, live, now):
                duty = changed
    assert accepted <= 1
