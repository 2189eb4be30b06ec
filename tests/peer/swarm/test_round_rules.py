"""Single rules of the round machine: who is refused, who falls behind, what is asked of whom."""

import pytest

from peer.swarm import round_types as rt
from protos.contract.certificate import contributions_digest
from protos.muster.v1 import common_pb2, rounds_pb2
from tests.peer.swarm.one_machine import (
    LEADER,
    OTHERS,
    PEERS,
    join_of,
    leader_at,
    machine_of,
    message_of,
    of_kind,
    own_of,
    value_of,
)
from tests.peer.swarm.round_simulation import TIMING

_INVALID = rounds_pb2.REFUSAL_KIND_INVALID


def test_group_forms_when_all_are_there_and_attempt_is_durable_first() -> None:
    machine = machine_of(LEADER)
    machine.handle(rt.Contributed(own_of(LEADER)), now_seconds=0.0)
    assert not of_kind(machine.handle(join_of(OTHERS[0]), now_seconds=0.1), rt.StartReduce)
    effects = machine.handle(join_of(OTHERS[1], windows=0), now_seconds=0.2)
    kinds = [type(effect) for effect in effects]
    assert kinds.index(rt.Persist) < kinds.index(rt.Send) < kinds.index(rt.StartReduce)
    group = of_kind(effects, rt.StartReduce)[0].group
    assert [member.contribution.peer_id for member in group.members] == sorted(PEERS)


def test_unreachable_member_is_not_waited_for_and_missing_one_until_the_deadline() -> None:
    machine = machine_of(LEADER)
    machine.handle(rt.Contributed(own_of(LEADER)), now_seconds=0.0)
    machine.handle(join_of(OTHERS[0]), now_seconds=0.1)
    effects = machine.handle(rt.PeerUnreachable(OTHERS[1], "refused"), now_seconds=0.2)
    assert of_kind(effects, rt.StartReduce)

    machine = machine_of(LEADER)
    machine.handle(join_of(OTHERS[0]), now_seconds=0.0)
    early = machine.handle(rt.Tick(), now_seconds=TIMING.form_wait_seconds - 0.1)
    assert not of_kind(early, rt.StartReduce)
    late = machine.handle(rt.Tick(), now_seconds=TIMING.form_wait_seconds + 0.1)
    members = of_kind(late, rt.StartReduce)[0].group.members
    assert {member.contribution.peer_id for member in members} == {OTHERS[0], LEADER}


def test_less_than_half_of_the_planned_tokens_waits_for_the_deadline() -> None:
    machine = machine_of(LEADER)
    machine.handle(rt.Contributed(own_of(LEADER)), now_seconds=0.0)
    for peer in OTHERS:
        machine.handle(rt.PeerUnreachable(peer, "refused"), now_seconds=0.1)
    assert not of_kind(machine.handle(rt.Tick(), now_seconds=1.0), rt.StartReduce)
    assert of_kind(machine.handle(rt.Tick(), now_seconds=4.0), rt.StartReduce)


def test_no_round_without_tokens_or_while_paused() -> None:
    machine = machine_of(LEADER)
    machine.handle(rt.Contributed(own_of(LEADER, 0)), now_seconds=0.0)
    for peer in OTHERS:
        machine.handle(join_of(peer, windows=0), now_seconds=0.1)
    assert not of_kind(machine.handle(rt.Tick(), now_seconds=100.0), rt.StartReduce)

    machine = machine_of(LEADER, is_paused=True)
    machine.handle(rt.Contributed(own_of(LEADER)), now_seconds=0.0)
    for peer in OTHERS:
        machine.handle(join_of(peer), now_seconds=0.1)
    assert not of_kind(machine.handle(rt.Tick(), now_seconds=100.0), rt.StartReduce)


def test_member_of_another_state_is_sent_to_resync() -> None:
    machine = machine_of(LEADER)
    effects = machine.handle(join_of(OTHERS[0], state=b"another"), now_seconds=0.0)
    refusal = of_kind(effects, rt.Send)[0].message.refusal
    assert refusal.kind == rounds_pb2.REFUSAL_KIND_RESYNC
    member = machine_of(OTHERS[0])
    received = rt.Received(LEADER, message_of(refusal=refusal))
    assert of_kind(member.handle(received, now_seconds=0.0), rt.Behind)


def test_later_step_means_that_we_are_behind() -> None:
    machine = machine_of(OTHERS[0])
    received = rt.Received(LEADER, message_of(outer_step=3, nudge=rounds_pb2.Nudge()))
    behind = of_kind(machine.handle(received, now_seconds=0.0), rt.Behind)[0]
    assert behind.outer_step == 3
    ack = rounds_pb2.RoundAck(incarnation=1, outer_step=1)
    assert of_kind(machine.handle(rt.Acked(LEADER, ack), now_seconds=0.1), rt.Behind)
    level = rounds_pb2.RoundAck(incarnation=1, outer_step=0)
    assert not of_kind(machine.handle(rt.Acked(LEADER, level), now_seconds=0.2), rt.Behind)


def test_promise_is_written_before_the_answer_and_binds() -> None:
    own = OTHERS[0]
    attempt = next(a for a in range(1, 50) if leader_at(a) != own)
    machine = machine_of(own)
    request = message_of(attempt=attempt, exchange_request=rounds_pb2.ExchangeRequest())
    effects = machine.handle(rt.Received(leader_at(attempt), request), now_seconds=0.0)
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
    answer = machine.handle(rt.Received(LEADER, message_of(repropose=late)), now_seconds=0.1)
    refusal = of_kind(answer, rt.Send)[0].message.refusal
    assert refusal.kind == rounds_pb2.REFUSAL_KIND_SUPERSEDED
    assert not of_kind(answer, rt.Persist)


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\xff"])
def test_malformed_bytes_of_a_member_are_dropped(data: bytes) -> None:
    machine = machine_of(OTHERS[0])
    vote = rounds_pb2.Vote(value=data, voter=LEADER, signature=LEADER.encode())
    machine.handle(rt.Received(LEADER, message_of(vote=vote)), now_seconds=0.0)
    assert machine.phase is rt.RoundPhase.FORM


def test_certificate_ends_the_step_from_any_attempt() -> None:
    machine = machine_of(OTHERS[0])
    contributions = rounds_pb2.Contributions().SerializeToString()
    value = rounds_pb2.RoundValue(incarnation=1, outer_step=1, previous_state_digest=b"state 0")
    certificate = rounds_pb2.Certificate(
        value=value.SerializeToString(),
        attempt=7,
        votes=[rounds_pb2.VoteSignature(voter=peer) for peer in PEERS[:2]],
        contributions=contributions,
    )
    message = message_of(attempt=7, certificate=certificate)
    commit = of_kind(machine.handle(rt.Received(LEADER, message), now_seconds=0.0), rt.Commit)[0]
    assert commit.holders == PEERS[:2]
    assert not commit.is_own_included
    assert machine.handle(rt.Tick(), now_seconds=1.0) == []


@pytest.mark.parametrize(("run_id", "is_kept"), [("sim", True), ("another", False)])
def test_record_of_another_run_is_not_trusted(run_id: str, is_kept: bool) -> None:
    own = OTHERS[0]
    vote = rounds_pb2.Vote(value=value_of(run_id), attempt=5, voter=own, signature=own.encode())
    record = rt.RoundRecord(incarnation=1, outer_step=1, promised_attempt=5, highest_vote=vote)
    machine = machine_of(own, record=record)
    assert machine.attempt == (5 if is_kept else 0)


def test_exchange_answer_with_a_vote_of_another_run_or_a_later_attempt_is_refused() -> None:
    own = LEADER
    attempt = next(a for a in range(1, 50) if leader_at(a) == own)
    for run_id, voted in (("another", 0), ("sim", attempt), ("sim", attempt + 1)):
        machine = machine_of(own)
        machine.handle(rt.Contributed(own_of(own)), now_seconds=0.0)
        nudge = message_of(attempt=attempt, nudge=rounds_pb2.Nudge())
        machine.handle(rt.Received(OTHERS[0], nudge), now_seconds=0.1)
        voter = OTHERS[0]
        answer = rounds_pb2.ExchangeAnswer(
            highest_vote=rounds_pb2.Vote(
                value=value_of(run_id), attempt=voted, voter=voter, signature=voter.encode()
            ),
            newest_directive=common_pb2.Signed(
                payload=common_pb2.Directive(incarnation=1, directive_number=1).SerializeToString()
            ),
        )
        message = message_of(attempt=attempt, exchange_answer=answer)
        sent = of_kind(machine.handle(rt.Received(voter, message), now_seconds=0.2), rt.Send)
        assert [s.message.refusal.kind for s in sent] == [rounds_pb2.REFUSAL_KIND_INVALID]


def test_attempts_far_ahead_are_not_followed() -> None:
    machine = machine_of(OTHERS[0])
    refusal = rounds_pb2.RoundRefusal(kind=rounds_pb2.REFUSAL_KIND_SUPERSEDED, attempt=2**32 - 1)
    machine.handle(rt.Received(LEADER, message_of(refusal=refusal)), now_seconds=0.0)
    assert machine.attempt <= 1003
    highest = machine.attempt
    far = next(a for a in range(highest + 1500, highest + 1600) if leader_at(a) == LEADER)
    request = message_of(attempt=far, exchange_request=rounds_pb2.ExchangeRequest())
    effects = machine.handle(rt.Received(LEADER, request), now_seconds=0.1)
    assert machine.attempt == highest
    assert "refused: attempt" in of_kind(effects, rt.PhaseChanged)[0].reason


def test_only_who_leads_an_attempt_or_was_asked_in_it_says_that_it_is_over() -> None:
    refusal = rounds_pb2.RoundRefusal(kind=rounds_pb2.REFUSAL_KIND_SUPERSEDED, attempt=7)
    for own, sender, expected in ((OTHERS[0], OTHERS[1], 0), (OTHERS[0], LEADER, 7)):
        machine = machine_of(own)
        machine.handle(rt.Received(sender, message_of(refusal=refusal)), now_seconds=0.0)
        assert machine.attempt == expected
    leader = machine_of(LEADER)
    leader.handle(rt.Received(OTHERS[0], message_of(refusal=refusal)), now_seconds=0.0)
    assert leader.attempt == 7
    leader.handle(rt.Received(LEADER, message_of(refusal=refusal)), now_seconds=0.1)
    assert leader.attempt == 7, "it speaks of an attempt that is over"


def test_reason_of_a_refused_proposal_stays_visible() -> None:
    machine = machine_of(OTHERS[0])
    repropose = rounds_pb2.Repropose(value=value_of("another"))
    received = rt.Received(LEADER, message_of(repropose=repropose))
    shown = of_kind(machine.handle(received, now_seconds=0.0), rt.PhaseChanged)
    assert "proposal of attempt 0 refused: value is for ('another'" in shown[-1].reason
    machine.handle(rt.Contributed(own_of(OTHERS[0])), now_seconds=0.1)
    later = of_kind(machine.handle(rt.Tick(), now_seconds=60.0), rt.PhaseChanged)
    assert "proposal of attempt 0 refused" in later[-1].reason


def test_accused_member_is_refused_with_the_reason_and_not_waited_for() -> None:
    leader_side = machine_of(LEADER)
    accuser, accused = OTHERS
    for peer in PEERS:
        leader_side.handle(join_of(peer), now_seconds=0.0)
    refusal = rounds_pb2.RoundRefusal(
        kind=rounds_pb2.REFUSAL_KIND_ATTEMPT_FAILED,
        reason=f"part of {accused}: piece 0 is not what was committed to",
        accused_peer_id=accused,
    )
    leader_side.handle(rt.Received(accuser, message_of(refusal=refusal)), now_seconds=0.1)
    sent = of_kind(leader_side.handle(join_of(accused), now_seconds=0.2), rt.Send)
    invalid = [s.message.refusal for s in sent if s.message.refusal.kind == _INVALID]
    assert len(invalid) == 1 and f"{accuser} says: part of {accused}" in invalid[0].reason


def test_accused_member_drops_what_it_brings() -> None:
    own = OTHERS[0]
    machine = machine_of(own)
    machine.handle(rt.Contributed(own_of(own)), now_seconds=0.0)
    refusal = rounds_pb2.RoundRefusal(
        kind=rounds_pb2.REFUSAL_KIND_ATTEMPT_FAILED, reason="not finite", accused_peer_id=own
    )
    effects = machine.handle(rt.Received(OTHERS[1], message_of(refusal=refusal)), now_seconds=0.1)
    assert "not finite" in of_kind(effects, rt.ContributionRefused)[0].reason
    again = machine.handle(rt.Contributed(own_of(own)), now_seconds=0.2)
    assert of_kind(again, rt.ContributionRefused)


def test_who_holds_up_attempts_by_saying_that_it_waits_is_late_in_the_end() -> None:
    machine = machine_of(LEADER)
    for attempt in range(4):
        assert machine.late == frozenset()
        event = rt.PeersLate(attempt, frozenset(), OTHERS[0])
        for _ in range(2):
            machine.handle(event, now_seconds=float(attempt))
    machine.handle(rt.PeersLate(4, frozenset(), OTHERS[0]), now_seconds=9.0)
    assert machine.late == {OTHERS[0]}


def _repropose(digest: bytes, *holders: str) -> rounds_pb2.Repropose:
    ranges = [rounds_pb2.LeasedRange(end_window=10)]
    held = rounds_pb2.Contribution(peer_id=OTHERS[1], ranges=ranges)
    contributions = rounds_pb2.Contributions(contributions=[held]).SerializeToString()
    value = rounds_pb2.RoundValue(
        run_id="sim",
        incarnation=1,
        outer_step=1,
        roster_directive_number=1,
        averaged_digest=digest,
        contributions_digest=contributions_digest(contributions),
        previous_state_digest=b"state 0",
        next_directive_number=1,
    )
    directive = common_pb2.Directive(incarnation=1, directive_number=1)
    return rounds_pb2.Repropose(
        value=value.SerializeToString(),
        contributions=contributions,
        next_directive=common_pb2.Signed(payload=directive.SerializeToString()),
        holders=holders,
    )


def test_bytes_are_fetched_of_members_alone_and_of_one_value_in_an_attempt() -> None:
    """Else a leader could have us ask millions of names, or fetch value after value."""
    own = OTHERS[0]
    attempt = next(a for a in range(1, 50) if leader_at(a) == LEADER)
    machine = machine_of(own)

    def asked(digest: bytes, *holders: str) -> set[tuple[str, ...]]:
        message = message_of(attempt=attempt, repropose=_repropose(digest, *holders))
        effects = machine.handle(rt.Received(LEADER, message), now_seconds=0.1)
        found = of_kind(effects, rt.FetchBytes)
        return {fetch.holders for fetch in found if fetch.averaged_digest == digest}

    strangers = [f"nobody {number}" for number in range(1000)]
    assert asked(b"1", *strangers, LEADER, LEADER) == {(LEADER,)}
    assert asked(b"2", LEADER) == set()
    assert asked(b"1", OTHERS[1]) == {(OTHERS[1],)}


@pytest.mark.parametrize("flaw", ["digests", "hidden reducer"])
def test_what_no_leader_lets_pass_is_the_leaders_doing_and_not_the_members(flaw: str) -> None:
    """Else a leader could have all honest members accuse one of them by altering its join."""
    own, other = OTHERS
    machine = machine_of(own, hidden=frozenset((other,)))
    machine.handle(rt.Contributed(own_of(own)), now_seconds=0.0)
    joins = {peer: join_of(peer).message.join_group for peer in PEERS}
    ends = [0 if peer == other else 2 for peer in PEERS]
    if flaw == "digests":
        del joins[other].piece_digests[1:]
    else:
        ends = [2 if peer >= other else 0 for peer in PEERS]
    group = rounds_pb2.FormGroup(
        members=[joins[peer] for peer in PEERS],
        reducer_piece_ends=sorted(ends),
        next_directive=joins[own].newest_directive,
    )
    effects = machine.handle(rt.Received(LEADER, message_of(form_group=group)), now_seconds=0.1)
    assert not of_kind(effects, rt.StartReduce)
    told = [s.message.refusal.accused_peer_id for s in of_kind(effects, rt.Send)]
    assert [name for name in told if name] == [LEADER]
