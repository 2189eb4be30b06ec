"""Single rules of the round machine: who is refused, who falls behind, what is asked of whom."""

from dataclasses import replace
from typing import Any

import pytest

from peer.swarm import round_types as rt
from peer.swarm.round_proposer import leader_of
from peer.swarm.round_state import RoundMachine
from protos.muster.v1 import common_pb2, rounds_pb2
from tests.peer.swarm.round_simulation import TIMING, Checks

_INVALID = rounds_pb2.REFUSAL_KIND_INVALID
PEERS = ("peer0", "peer1", "peer2")
LEADER = leader_of(
    [common_pb2.RosterEntry(peer_id=p, has_vote=True) for p in PEERS],
    incarnation=1,
    outer_step=1,
    attempt=0,
)
OTHERS = tuple(p for p in PEERS if p != LEADER)


def _machine(
    own: str,
    *,
    is_paused: bool = False,
    record: rt.RoundRecord | None = None,
    left_out: frozenset[str] = frozenset(),
    timing: rt.RoundTiming = TIMING,
) -> RoundMachine:
    roster = [
        common_pb2.RosterEntry(
            peer_id=p, has_vote=True, round_tokens=10, can_accept_connections=True
        )
        for p in PEERS
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


def _own(peer: str, windows: int = 10) -> rt.OwnContribution:
    ranges = [rounds_pb2.LeasedRange(end_window=windows)] if windows else []
    contribution = rounds_pb2.Contribution(peer_id=peer, ranges=ranges)
    return rt.OwnContribution(contribution=contribution, piece_digests=(b"d",) * 2 * bool(windows))


def _join(peer: str, *, windows: int = 10, state: bytes = b"state 0") -> rt.Received:
    own = _own(peer, windows)
    join = rounds_pb2.JoinGroup(
        previous_state_digest=state,
        contribution=own.contribution,
        piece_digests=own.piece_digests,
        newest_directive=common_pb2.Signed(
            payload=common_pb2.Directive(incarnation=1, directive_number=1).SerializeToString()
        ),
    )
    return rt.Received(peer, _message(join_group=join))


def _message(*, outer_step: int = 1, attempt: int = 0, **body: Any) -> rounds_pb2.RoundMessage:
    return rounds_pb2.RoundMessage(incarnation=1, outer_step=outer_step, attempt=attempt, **body)


def _of(effects: list[rt.Effect], kind: type[Any]) -> list[Any]:
    return [effect for effect in effects if isinstance(effect, kind)]


def test_group_forms_when_all_are_there_and_attempt_is_durable_first() -> None:
    machine = _machine(LEADER)
    machine.handle(rt.Contributed(_own(LEADER)), now_seconds=0.0)
    assert not _of(machine.handle(_join(OTHERS[0]), now_seconds=0.1), rt.StartReduce)
    effects = machine.handle(_join(OTHERS[1], windows=0), now_seconds=0.2)
    kinds = [type(effect) for effect in effects]
    assert kinds.index(rt.Persist) < kinds.index(rt.Send) < kinds.index(rt.StartReduce)
    group = _of(effects, rt.StartReduce)[0].group
    assert [member.contribution.peer_id for member in group.members] == sorted(PEERS)


def test_unreachable_member_is_not_waited_for_and_missing_one_until_the_deadline() -> None:
    machine = _machine(LEADER)
    machine.handle(rt.Contributed(_own(LEADER)), now_seconds=0.0)
    machine.handle(_join(OTHERS[0]), now_seconds=0.1)
    effects = machine.handle(rt.PeerUnreachable(OTHERS[1], "refused"), now_seconds=0.2)
    assert _of(effects, rt.StartReduce)

    machine = _machine(LEADER)
    machine.handle(_join(OTHERS[0]), now_seconds=0.0)
    early = machine.handle(rt.Tick(), now_seconds=TIMING.form_wait_seconds - 0.1)
    assert not _of(early, rt.StartReduce)
    late = machine.handle(rt.Tick(), now_seconds=TIMING.form_wait_seconds + 0.1)
    members = _of(late, rt.StartReduce)[0].group.members
    assert {member.contribution.peer_id for member in members} == {OTHERS[0], LEADER}


def test_less_than_half_of_the_planned_tokens_waits_for_the_deadline() -> None:
    machine = _machine(LEADER)
    machine.handle(rt.Contributed(_own(LEADER)), now_seconds=0.0)
    for peer in OTHERS:
        machine.handle(rt.PeerUnreachable(peer, "refused"), now_seconds=0.1)
    assert not _of(machine.handle(rt.Tick(), now_seconds=1.0), rt.StartReduce)
    assert _of(machine.handle(rt.Tick(), now_seconds=4.0), rt.StartReduce)


def test_no_round_without_tokens_or_while_paused() -> None:
    machine = _machine(LEADER)
    machine.handle(rt.Contributed(_own(LEADER, 0)), now_seconds=0.0)
    for peer in OTHERS:
        machine.handle(_join(peer, windows=0), now_seconds=0.1)
    assert not _of(machine.handle(rt.Tick(), now_seconds=100.0), rt.StartReduce)

    machine = _machine(LEADER, is_paused=True)
    machine.handle(rt.Contributed(_own(LEADER)), now_seconds=0.0)
    for peer in OTHERS:
        machine.handle(_join(peer), now_seconds=0.1)
    assert not _of(machine.handle(rt.Tick(), now_seconds=100.0), rt.StartReduce)


def test_member_of_another_state_is_sent_to_resync() -> None:
    machine = _machine(LEADER)
    effects = machine.handle(_join(OTHERS[0], state=b"another"), now_seconds=0.0)
    refusal = _of(effects, rt.Send)[0].message.refusal
    assert refusal.kind == rounds_pb2.REFUSAL_KIND_RESYNC
    member = _machine(OTHERS[0])
    received = rt.Received(LEADER, _message(refusal=refusal))
    assert _of(member.handle(received, now_seconds=0.0), rt.Behind)


def test_later_step_means_that_we_are_behind() -> None:
    machine = _machine(OTHERS[0])
    received = rt.Received(LEADER, _message(outer_step=3, nudge=rounds_pb2.Nudge()))
    behind = _of(machine.handle(received, now_seconds=0.0), rt.Behind)[0]
    assert behind.outer_step == 3
    ack = rounds_pb2.RoundAck(incarnation=1, outer_step=1)
    assert _of(machine.handle(rt.Acked(LEADER, ack), now_seconds=0.1), rt.Behind)
    level = rounds_pb2.RoundAck(incarnation=1, outer_step=0)
    assert not _of(machine.handle(rt.Acked(LEADER, level), now_seconds=0.2), rt.Behind)


def test_promise_is_written_before_the_answer_and_binds() -> None:
    own = OTHERS[0]
    attempt = next(a for a in range(1, 50) if _leader(a) != own)
    machine = _machine(own)
    request = _message(attempt=attempt, exchange_request=rounds_pb2.ExchangeRequest())
    effects = machine.handle(rt.Received(_leader(attempt), request), now_seconds=0.0)
    persisted, sent = effects[:2]
    assert isinstance(persisted, rt.Persist) and isinstance(sent, rt.Send)
    assert persisted.record.promised_attempt == attempt
    assert sent.message.WhichOneof("body") == "exchange_answer"
    value = rounds_pb2.RoundValue(
        run_id="sim",
        incarnation=1,
        outer_step=1,
        roster_directive_number=1,
        previous_state_digest=b"state 0",
    )
    late = rounds_pb2.Repropose(value=value.SerializeToString())
    answer = machine.handle(rt.Received(LEADER, _message(repropose=late)), now_seconds=0.1)
    refusal = _of(answer, rt.Send)[0].message.refusal
    assert refusal.kind == rounds_pb2.REFUSAL_KIND_SUPERSEDED
    assert not _of(answer, rt.Persist)


def _leader(attempt: int) -> str:
    roster = [common_pb2.RosterEntry(peer_id=p, has_vote=True) for p in PEERS]
    return leader_of(roster, incarnation=1, outer_step=1, attempt=attempt)


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\xff"])
def test_malformed_bytes_of_a_member_are_dropped(data: bytes) -> None:
    machine = _machine(OTHERS[0])
    vote = rounds_pb2.Vote(value=data, voter=LEADER, signature=LEADER.encode())
    machine.handle(rt.Received(LEADER, _message(vote=vote)), now_seconds=0.0)
    assert machine.phase is rt.RoundPhase.FORM


def test_certificate_ends_the_step_from_any_attempt() -> None:
    machine = _machine(OTHERS[0])
    contributions = rounds_pb2.Contributions().SerializeToString()
    value = rounds_pb2.RoundValue(incarnation=1, outer_step=1, previous_state_digest=b"state 0")
    certificate = rounds_pb2.Certificate(
        value=value.SerializeToString(),
        attempt=7,
        votes=[rounds_pb2.VoteSignature(voter=peer) for peer in PEERS[:2]],
        contributions=contributions,
    )
    message = _message(attempt=7, certificate=certificate)
    commit = _of(machine.handle(rt.Received(LEADER, message), now_seconds=0.0), rt.Commit)[0]
    assert commit.holders == PEERS[:2]
    assert not commit.is_own_included
    assert machine.handle(rt.Tick(), now_seconds=1.0) == []


def _value(run_id: str = "sim", digest: bytes = b"") -> bytes:
    value = rounds_pb2.RoundValue(
        run_id=run_id,
        incarnation=1,
        outer_step=1,
        roster_directive_number=1,
        averaged_digest=digest,
        previous_state_digest=b"state 0",
    )
    return value.SerializeToString()


@pytest.mark.parametrize(("run_id", "is_kept"), [("sim", True), ("another", False)])
def test_record_of_another_run_is_not_trusted(run_id: str, is_kept: bool) -> None:
    own = OTHERS[0]
    vote = rounds_pb2.Vote(value=_value(run_id), attempt=5, voter=own, signature=own.encode())
    record = rt.RoundRecord(incarnation=1, outer_step=1, promised_attempt=5, highest_vote=vote)
    machine = _machine(own, record=record)
    assert machine.attempt == (5 if is_kept else 0)


def test_exchange_answer_with_a_vote_of_another_run_or_a_later_attempt_is_refused() -> None:
    own = LEADER
    attempt = next(a for a in range(1, 50) if _leader(a) == own)
    for run_id, voted in (("another", 0), ("sim", attempt), ("sim", attempt + 1)):
        machine = _machine(own)
        machine.handle(rt.Contributed(_own(own)), now_seconds=0.0)
        nudge = _message(attempt=attempt, nudge=rounds_pb2.Nudge())
        machine.handle(rt.Received(OTHERS[0], nudge), now_seconds=0.1)
        voter = OTHERS[0]
        answer = rounds_pb2.ExchangeAnswer(
            highest_vote=rounds_pb2.Vote(
                value=_value(run_id), attempt=voted, voter=voter, signature=voter.encode()
            ),
            newest_directive=common_pb2.Signed(
                payload=common_pb2.Directive(incarnation=1, directive_number=1).SerializeToString()
            ),
        )
        message = _message(attempt=attempt, exchange_answer=answer)
        sent = _of(machine.handle(rt.Received(voter, message), now_seconds=0.2), rt.Send)
        assert [s.message.refusal.kind for s in sent] == [rounds_pb2.REFUSAL_KIND_INVALID]


def test_attempts_far_ahead_are_not_followed() -> None:
    machine = _machine(OTHERS[0])
    refusal = rounds_pb2.RoundRefusal(kind=rounds_pb2.REFUSAL_KIND_SUPERSEDED, attempt=2**32 - 1)
    machine.handle(rt.Received(LEADER, _message(refusal=refusal)), now_seconds=0.0)
    assert machine.attempt <= 1003
    highest = machine.attempt
    far = next(a for a in range(highest + 1500, highest + 1600) if _leader(a) == LEADER)
    request = _message(attempt=far, exchange_request=rounds_pb2.ExchangeRequest())
    effects = machine.handle(rt.Received(LEADER, request), now_seconds=0.1)
    assert machine.attempt == highest
    assert "refused: attempt" in _of(effects, rt.PhaseChanged)[0].reason


def test_reason_of_a_refused_proposal_stays_visible() -> None:
    machine = _machine(OTHERS[0])
    repropose = rounds_pb2.Repropose(value=_value("another"))
    received = rt.Received(LEADER, _message(repropose=repropose))
    shown = _of(machine.handle(received, now_seconds=0.0), rt.PhaseChanged)
    assert "proposal of attempt 0 refused: value is for ('another'" in shown[-1].reason
    machine.handle(rt.Contributed(_own(OTHERS[0])), now_seconds=0.1)
    later = _of(machine.handle(rt.Tick(), now_seconds=60.0), rt.PhaseChanged)
    assert "proposal of attempt 0 refused" in later[-1].reason


def test_accused_member_is_refused_with_the_reason_and_not_waited_for() -> None:
    leader_side = _machine(LEADER)
    accuser, accused = OTHERS
    for peer in PEERS:
        leader_side.handle(_join(peer), now_seconds=0.0)
    refusal = rounds_pb2.RoundRefusal(
        kind=rounds_pb2.REFUSAL_KIND_ATTEMPT_FAILED,
        reason=f"part of {accused}: piece 0 is not what was committed to",
        accused_peer_id=accused,
    )
    leader_side.handle(rt.Received(accuser, _message(refusal=refusal)), now_seconds=0.1)
    sent = _of(leader_side.handle(_join(accused), now_seconds=0.2), rt.Send)
    invalid = [s.message.refusal for s in sent if s.message.refusal.kind == _INVALID]
    assert len(invalid) == 1 and f"{accuser} says: part of {accused}" in invalid[0].reason


def test_accused_member_drops_what_it_brings() -> None:
    own = OTHERS[0]
    machine = _machine(own)
    machine.handle(rt.Contributed(_own(own)), now_seconds=0.0)
    refusal = rounds_pb2.RoundRefusal(
        kind=rounds_pb2.REFUSAL_KIND_ATTEMPT_FAILED, reason="not finite", accused_peer_id=own
    )
    effects = machine.handle(rt.Received(OTHERS[1], _message(refusal=refusal)), now_seconds=0.1)
    assert "not finite" in _of(effects, rt.ContributionRefused)[0].reason
    again = machine.handle(rt.Contributed(_own(own)), now_seconds=0.2)
    assert _of(again, rt.ContributionRefused)


def _members(effects: list[rt.Effect]) -> set[str]:
    return {m.contribution.peer_id for m in _of(effects, rt.StartReduce)[0].group.members}


def test_who_was_late_twice_is_not_asked_again_in_this_step() -> None:
    slow = OTHERS[1]
    machine = _machine(LEADER)
    machine.handle(rt.Contributed(_own(LEADER)), now_seconds=0.0)
    for attempt in (0, 1, 1):
        machine.handle(rt.PeersLate(attempt, frozenset((slow,))), now_seconds=0.0)
        assert bool(attempt) == (slow in machine.late)
    machine.handle(_join(slow), now_seconds=0.1)
    effects = machine.handle(_join(OTHERS[0]), now_seconds=0.2)
    assert _members(effects) == {LEADER, OTHERS[0]}


_BYTES_SECONDS = 4.0
"""As long as the others' bytes may take at least: 2 s and the links' time, in 0.1 s steps."""


def _averaged(own: str) -> RoundMachine:
    """A member that has averaged with all, at 0.1 s, and waits for their votes."""
    timing = replace(TIMING, reduce_wait_seconds=_BYTES_SECONDS, agree_wait_seconds=1.0)
    leader, machine = _machine(LEADER, timing=timing), _machine(own, timing=timing)
    leader.handle(rt.Contributed(_own(LEADER)), now_seconds=0.0)
    leader.handle(_join(OTHERS[0]), now_seconds=0.0)
    group = _of(leader.handle(_join(OTHERS[1]), now_seconds=0.0), rt.StartReduce)[0].group
    if own == LEADER:
        machine = leader
    else:
        machine.handle(rt.Contributed(_own(own)), now_seconds=0.0)
        machine.handle(rt.Received(LEADER, _message(form_group=group)), now_seconds=0.0)
    machine.handle(rt.ReduceDone(0, b"averaged"), now_seconds=0.1)
    assert machine.phase is rt.RoundPhase.AGREE
    return machine


def _given_up_seconds(machine: RoundMachine, *, from_seconds: float) -> float:
    """When the machine goes on to another attempt; infinity if not within the time for bytes."""
    for tick in range(round((_BYTES_SECONDS - from_seconds) * 10)):
        now = from_seconds + tick / 10
        machine.handle(rt.Tick(), now_seconds=now)
        if machine.attempt > 0:
            return now
    return float("inf")


def test_who_has_averaged_waits_only_a_moment_for_a_member_that_is_gone() -> None:
    """Another may still wait for its bytes; the next attempt lets it fetch ours. Whoever answers
    again is not gone.
    """
    own = OTHERS[0]
    gone = rt.PeerUnreachable(LEADER, "no answer")
    assert _given_up_seconds(_averaged(own), from_seconds=1.5) == float("inf")

    machine = _averaged(own)
    machine.handle(gone, now_seconds=1.5)
    moment_seconds = 2 * TIMING.resend_seconds
    given_up_seconds = _given_up_seconds(machine, from_seconds=1.6)
    assert given_up_seconds == pytest.approx(1.5 + moment_seconds, abs=0.11)

    machine = _averaged(own)
    machine.handle(gone, now_seconds=1.5)
    machine.handle(rt.Acked(LEADER, rounds_pb2.RoundAck(incarnation=1)), now_seconds=2.0)
    assert _given_up_seconds(machine, from_seconds=2.1) == float("inf")


def test_who_has_averaged_gives_up_at_once_when_too_few_others_can_vote() -> None:
    """The leader does not: it lets the one that has failed fetch its bytes."""
    own, other = OTHERS
    refusal = rounds_pb2.RoundRefusal(
        kind=rounds_pb2.REFUSAL_KIND_ATTEMPT_FAILED, reason=f"{LEADER} has sent nothing for 1.4 s"
    )
    machine = _averaged(own)
    machine.handle(rt.Received(other, _message(refusal=refusal)), now_seconds=0.2)
    assert machine.attempt == 0, "the leader may vote"
    machine.handle(rt.PeerUnreachable(LEADER, "no answer"), now_seconds=0.3)
    assert machine.attempt > 0 and machine.phase is rt.RoundPhase.FORM

    machine = _averaged(LEADER)
    effects = machine.handle(rt.Received(other, _message(refusal=refusal)), now_seconds=0.2)
    assert any(s.message.WhichOneof("body") == "repropose" for s in _of(effects, rt.Send))
    machine.handle(rt.PeerUnreachable(own, "no answer"), now_seconds=0.3)
    assert machine.attempt == 0


def test_the_slow_are_asked_when_nobody_else_has_work() -> None:
    slow = OTHERS[1]
    machine = _machine(LEADER, left_out=frozenset((slow,)))
    machine.handle(rt.Contributed(_own(LEADER, 0)), now_seconds=0.0)
    machine.handle(_join(slow), now_seconds=0.1)
    effects = machine.handle(_join(OTHERS[0], windows=0), now_seconds=0.2)
    effects += machine.handle(rt.Tick(), now_seconds=TIMING.form_wait_seconds + 1.0)
    assert _members(effects) == set(PEERS)


def test_a_slow_leader_is_passed_over_while_another_may_lead() -> None:
    machine = _machine(OTHERS[0], left_out=frozenset((LEADER,)))
    machine.handle(rt.Contributed(_own(OTHERS[0])), now_seconds=0.0)
    assert machine.attempt > 0 and machine.leader_peer_id != LEADER
    machine = _machine(OTHERS[0], left_out=frozenset(PEERS))
    machine.handle(rt.Contributed(_own(OTHERS[0])), now_seconds=0.0)
    assert machine.attempt == 0


def test_unmeasured_averaging_ends_when_nothing_has_moved_for_long() -> None:
    for is_guessed in (True, False):
        machine = _machine(LEADER, timing=replace(TIMING, is_guessed=is_guessed))
        machine.handle(rt.Contributed(_own(LEADER)), now_seconds=0.0)
        for peer in OTHERS:
            machine.handle(_join(peer), now_seconds=0.0)
        wait_seconds = TIMING.reduce_wait_seconds
        for number in range(10):
            machine.handle(rt.ReduceMoved(0), now_seconds=0.9 * wait_seconds * number)
        machine.handle(rt.ReduceMoved(1), now_seconds=8.9 * wait_seconds)  # of no attempt of ours
        machine.handle(rt.Tick(), now_seconds=9.05 * wait_seconds)
        assert (machine.attempt == 0) == is_guessed
        machine.handle(rt.Tick(), now_seconds=9.15 * wait_seconds)
        assert machine.attempt > 0


def test_each_failed_reduction_makes_the_next_deadline_longer() -> None:
    machine = _machine(LEADER)
    machine.handle(rt.Contributed(_own(LEADER)), now_seconds=0.0)
    for peer in OTHERS:
        machine.handle(_join(peer), now_seconds=0.0)
    assert machine.phase_deadline_seconds == TIMING.reduce_wait_seconds
    machine.handle(rt.ReduceFailed(0, "too slow"), now_seconds=1.0)
    assert machine.num_failed_reductions == 1
    attempt = next(a for a in range(1, 50) if _leader(a) != LEADER)
    group = rounds_pb2.FormGroup(
        members=[_join(peer).message.join_group for peer in PEERS],
        reducer_piece_ends=(0, 1, 2),
        next_directive=_join(LEADER).message.join_group.newest_directive,
    )
    message = _message(attempt=attempt, form_group=group)
    effects = machine.handle(rt.Received(_leader(attempt), message), now_seconds=1.0)
    assert _of(effects, rt.StartReduce)
    assert machine.phase_deadline_seconds == 1.0 + 2 * TIMING.reduce_wait_seconds
