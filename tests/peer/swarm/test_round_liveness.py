"""A round goes on: who is waited for, for how long, and when an attempt is given up."""

from dataclasses import replace

import pytest

from peer.swarm import round_types as rt
from peer.swarm.round_state import RoundMachine
from protos.contract.certificate import contributions_digest
from protos.muster.v1 import rounds_pb2
from tests.peer.swarm.one_machine import (
    LEADER,
    OTHERS,
    PEERS,
    join_of,
    leader_at,
    machine_of,
    members_of,
    message_of,
    of_kind,
    own_of,
    value_of,
)
from tests.peer.swarm.round_simulation import TIMING, Checks, Simulation, World


def test_who_was_late_twice_is_not_asked_again_in_this_step() -> None:
    slow = OTHERS[1]
    machine = machine_of(LEADER)
    machine.handle(rt.Contributed(own_of(LEADER)), now_seconds=0.0)
    for attempt in (0, 1, 1):
        machine.handle(rt.PeersLate(attempt, frozenset((slow,))), now_seconds=0.0)
        assert bool(attempt) == (slow in machine.late)
    machine.handle(join_of(slow), now_seconds=0.1)
    effects = machine.handle(join_of(OTHERS[0]), now_seconds=0.2)
    assert members_of(effects) == {LEADER, OTHERS[0]}


_BYTES_SECONDS = 4.0
"""As long as the others' bytes may take at least: 2 s and the links' time, in 0.1 s steps."""


def _averaging(own: str, *, timing: rt.RoundTiming, now_seconds: float = 0.0) -> RoundMachine:
    """A member that averages with all."""
    leader, machine = machine_of(LEADER, timing=timing), machine_of(own, timing=timing)
    leader.handle(rt.Contributed(own_of(LEADER)), now_seconds=now_seconds)
    leader.handle(join_of(OTHERS[0]), now_seconds=now_seconds)
    effects = leader.handle(join_of(OTHERS[1]), now_seconds=now_seconds)
    if own == LEADER:
        return leader
    formed = message_of(form_group=of_kind(effects, rt.StartReduce)[0].group)
    machine.handle(rt.Contributed(own_of(own)), now_seconds=now_seconds)
    machine.handle(rt.Received(LEADER, formed), now_seconds=now_seconds)
    assert machine.phase is rt.RoundPhase.REDUCE
    return machine


def _averaged(own: str) -> RoundMachine:
    """A member that has averaged with all, at 0.1 s, and waits for their votes."""
    timing = replace(TIMING, reduce_wait_seconds=_BYTES_SECONDS, agree_wait_seconds=1.0)
    machine = _averaging(own, timing=timing)
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
    machine.handle(rt.Received(other, message_of(refusal=refusal)), now_seconds=0.2)
    assert machine.attempt == 0, "the leader may vote"
    machine.handle(rt.PeerUnreachable(LEADER, "no answer"), now_seconds=0.3)
    assert machine.attempt > 0 and machine.phase is rt.RoundPhase.FORM

    machine = _averaged(LEADER)
    effects = machine.handle(rt.Received(other, message_of(refusal=refusal)), now_seconds=0.2)
    assert any(s.message.WhichOneof("body") == "repropose" for s in of_kind(effects, rt.Send))
    machine.handle(rt.PeerUnreachable(own, "no answer"), now_seconds=0.3)
    assert machine.attempt == 0


@pytest.mark.parametrize("has_averaged", [True, False])
def test_only_members_of_a_group_end_its_attempt(has_averaged: bool) -> None:
    """Leaving a member out is of no use if it can go on ending attempts."""
    member, outsider = OTHERS
    failed = rounds_pb2.RoundRefusal(kind=rounds_pb2.REFUSAL_KIND_ATTEMPT_FAILED, reason="so")
    for sender in (outsider, member):
        machine = machine_of(LEADER, left_out=frozenset((outsider,)))
        machine.handle(rt.Contributed(own_of(LEADER)), now_seconds=0.0)
        assert members_of(machine.handle(join_of(member), now_seconds=0.0)) == {LEADER, member}
        if has_averaged:
            machine.handle(rt.ReduceDone(0, b"averaged"), now_seconds=0.1)
        effects = machine.handle(rt.Received(sender, message_of(refusal=failed)), now_seconds=0.2)
        assert bool(of_kind(effects, rt.Send)) == (sender == member)


@pytest.mark.parametrize("has_voted", [True, False])
def test_a_vote_counts_also_when_its_voter_is_gone_since(has_voted: bool) -> None:
    """Of four one is gone, and one since its vote: the last one's vote makes a quorum. An exchange
    would forbid it, and could not find a quorum itself.
    """
    peers = (*PEERS, "peer3")
    timing = replace(TIMING, reduce_wait_seconds=_BYTES_SECONDS, agree_wait_seconds=1.0)
    own = machine_of(PEERS[0], peers=peers).leader_peer_id
    last, voter, gone = (p for p in peers if p != own)
    machine = machine_of(own, timing=timing, peers=peers)
    machine.handle(rt.PeerUnreachable(gone, "no answer"), now_seconds=0.0)
    machine.handle(rt.Contributed(own_of(own)), now_seconds=0.0)
    machine.handle(join_of(last), now_seconds=0.0)
    effects = machine.handle(join_of(voter), now_seconds=0.0)
    assert members_of(effects) == {own, last, voter}
    effects = machine.handle(rt.ReduceDone(0, b"averaged"), now_seconds=0.1)
    (vote,) = (s.message.vote for s in of_kind(effects, rt.Send) if s.message.HasField("vote"))
    if has_voted:
        of_voter = Checks(voter, machine.setup.directive).sign_vote(vote.value, 0)
        machine.handle(rt.Received(voter, message_of(vote=of_voter)), now_seconds=0.2)
    machine.handle(rt.PeerUnreachable(voter, "no answer"), now_seconds=0.3)
    machine.handle(rt.Tick(), now_seconds=0.9 * _BYTES_SECONDS)
    assert (machine.attempt == 0) == has_voted


def test_the_slow_are_asked_when_nobody_else_has_work() -> None:
    slow = OTHERS[1]
    machine = machine_of(LEADER, left_out=frozenset((slow,)))
    machine.handle(rt.Contributed(own_of(LEADER, 0)), now_seconds=0.0)
    machine.handle(join_of(slow), now_seconds=0.1)
    effects = machine.handle(join_of(OTHERS[0], windows=0), now_seconds=0.2)
    effects += machine.handle(rt.Tick(), now_seconds=TIMING.form_wait_seconds + 1.0)
    assert members_of(effects) == set(PEERS)


def test_a_slow_leader_is_passed_over_while_another_may_lead() -> None:
    machine = machine_of(OTHERS[0], left_out=frozenset((LEADER,)))
    machine.handle(rt.Contributed(own_of(OTHERS[0])), now_seconds=0.0)
    assert machine.attempt > 0 and machine.leader_peer_id != LEADER
    machine = machine_of(OTHERS[0], left_out=frozenset(PEERS))
    machine.handle(rt.Contributed(own_of(OTHERS[0])), now_seconds=0.0)
    assert machine.attempt == 0


def test_unmeasured_averaging_ends_when_nothing_has_moved_for_long() -> None:
    for is_guessed in (True, False):
        machine = machine_of(LEADER, timing=replace(TIMING, is_guessed=is_guessed))
        machine.handle(rt.Contributed(own_of(LEADER)), now_seconds=0.0)
        for peer in OTHERS:
            machine.handle(join_of(peer), now_seconds=0.0)
        wait_seconds = TIMING.reduce_wait_seconds
        for number in range(10):
            machine.handle(rt.ReduceMoved(0), now_seconds=0.9 * wait_seconds * number)
        machine.handle(rt.ReduceMoved(1), now_seconds=8.9 * wait_seconds)  # of no attempt of ours
        machine.handle(rt.Tick(), now_seconds=9.05 * wait_seconds)
        assert (machine.attempt == 0) == is_guessed
        machine.handle(rt.Tick(), now_seconds=9.15 * wait_seconds)
        assert machine.attempt > 0


def test_each_failed_reduction_makes_the_next_deadline_longer() -> None:
    machine = machine_of(LEADER)
    machine.handle(rt.Contributed(own_of(LEADER)), now_seconds=0.0)
    for peer in OTHERS:
        machine.handle(join_of(peer), now_seconds=0.0)
    assert machine.phase_deadline_seconds == TIMING.reduce_wait_seconds
    machine.handle(rt.ReduceFailed(0, "too slow"), now_seconds=1.0)
    assert machine.num_failed_reductions == 1
    attempt = next(a for a in range(1, 50) if leader_at(a) != LEADER)
    group = rounds_pb2.FormGroup(
        members=[join_of(peer).message.join_group for peer in PEERS],
        reducer_piece_ends=(0, 1, 2),
        next_directive=join_of(LEADER).message.join_group.newest_directive,
    )
    message = message_of(attempt=attempt, form_group=group)
    effects = machine.handle(rt.Received(leader_at(attempt), message), now_seconds=1.0)
    assert of_kind(effects, rt.StartReduce)
    assert machine.phase_deadline_seconds == 1.0 + 2 * TIMING.reduce_wait_seconds


def test_a_moment_without_contact_is_no_share_of_the_training_before() -> None:
    """Given up as soon after ten minutes of training as after none."""
    timing = replace(TIMING, reduce_wait_seconds=200.0, agree_wait_seconds=1.0)
    own, begin_seconds = OTHERS[0], 600.0
    machine = _averaging(own, timing=timing, now_seconds=begin_seconds)
    machine.handle(rt.ReduceDone(0, b"averaged"), now_seconds=begin_seconds + 1.0)
    gone = rt.PeerUnreachable(LEADER, "no answer")
    machine.handle(gone, now_seconds=begin_seconds + 1.0)
    machine.handle(rt.Tick(), now_seconds=begin_seconds + 1.1 + 2 * timing.resend_seconds)
    assert machine.attempt > 0


@pytest.mark.parametrize("is_holder_gone", [True, False])
def test_bytes_are_not_awaited_from_holders_that_are_gone(is_holder_gone: bool) -> None:
    timing = replace(TIMING, reduce_wait_seconds=200.0, agree_wait_seconds=1.0)
    own, holder = OTHERS
    attempt = next(a for a in range(1, 50) if leader_at(a) == LEADER)
    machine = machine_of(own, timing=timing)
    machine.handle(rt.Contributed(own_of(own)), now_seconds=0.0)
    request = message_of(attempt=attempt, exchange_request=rounds_pb2.ExchangeRequest())
    machine.handle(rt.Received(LEADER, request), now_seconds=1.0)
    held = rounds_pb2.Contributions(contributions=[own_of(holder).contribution])
    value = rounds_pb2.RoundValue.FromString(value_of(digest=b"averaged"))
    value.contributions_digest = contributions_digest(held.SerializeToString())
    value.next_directive_number = 1
    again = rounds_pb2.Repropose(
        value=value.SerializeToString(),
        contributions=held.SerializeToString(),
        next_directive=join_of(holder).message.join_group.newest_directive,
        holders=[holder],
    )
    message = message_of(attempt=attempt, repropose=again)
    assert of_kind(machine.handle(rt.Received(LEADER, message), now_seconds=1.1), rt.FetchBytes)
    if is_holder_gone:
        machine.handle(rt.PeerUnreachable(holder, "no answer"), now_seconds=1.2)
    machine.handle(rt.Tick(), now_seconds=20.0)
    assert (machine.attempt > attempt) == is_holder_gone


def test_a_member_that_cannot_lead_waits_while_no_leader_can_be_reached() -> None:
    """Cut off for a minute, it does not run ahead to attempts that nobody follows."""
    hidden, leaders = PEERS[0], PEERS[1:]
    machine = machine_of(hidden, hidden=frozenset((hidden,)))
    machine.handle(rt.Contributed(own_of(hidden)), now_seconds=0.0)
    for peer in leaders:
        machine.handle(rt.PeerUnreachable(peer, "no answer"), now_seconds=1.0)
    for tick in range(600):
        machine.handle(rt.Tick(), now_seconds=1.0 + tick / 10)
    assert machine.attempt < 20


@pytest.mark.parametrize("is_guessed", [True, False])
@pytest.mark.parametrize("body", ["join_group", "nudge"])
def test_who_has_measured_nothing_leaves_averaging_after_a_member_that_has(
    is_guessed: bool, body: str
) -> None:
    """It would wait for a stopped member for long, and lead nobody in the meantime."""
    own, other = OTHERS
    machine = _averaging(own, timing=replace(TIMING, is_guessed=is_guessed))
    attempt = next(a for a in range(1, 50) if leader_at(a) == own)
    bodies = {"join_group": join_of(other).message.join_group, "nudge": rounds_pb2.Nudge()}
    message = message_of(attempt=attempt, **{body: bodies[body]})
    machine.handle(rt.Received(other, message), now_seconds=1.0)
    assert machine.attempt == (attempt if is_guessed else 0)


def test_waits_that_were_learnt_since_the_step_began_count() -> None:
    machine = machine_of(LEADER, timing=replace(TIMING, form_wait_seconds=30.0))
    machine.handle(rt.Contributed(own_of(LEADER)), now_seconds=0.0)
    assert not of_kind(machine.handle(join_of(OTHERS[0]), now_seconds=3.5), rt.StartReduce)
    effects = machine.handle(rt.TimingLearnt(TIMING), now_seconds=3.6)
    assert members_of(effects) == {LEADER, OTHERS[0]}


def test_a_dead_leader_is_passed_over_for_a_slow_one() -> None:
    hidden, leaders = PEERS[0], frozenset(PEERS[1:])
    machine = machine_of(hidden, hidden=frozenset((hidden,)), left_out=leaders)
    dead = machine.leader_peer_id
    machine.handle(rt.Contributed(own_of(hidden)), now_seconds=0.0)
    machine.handle(rt.PeerUnreachable(dead, "no answer"), now_seconds=0.1)
    assert machine.leader_peer_id in leaders - {dead}


def test_while_nobody_that_leads_can_be_reached_all_are_tried() -> None:
    hidden, leaders = PEERS[0], set(PEERS[1:])
    machine = machine_of(hidden, hidden=frozenset((hidden,)))
    machine.handle(rt.Contributed(own_of(hidden)), now_seconds=0.0)
    for peer in sorted(leaders):
        machine.handle(rt.PeerUnreachable(peer, "no answer"), now_seconds=1.0)
    tried = set()
    for tick in range(1, 8):
        effects = machine.handle(rt.Tick(), now_seconds=1.0 + tick / 10)
        tried |= {peer for send in of_kind(effects, rt.Send) for peer in send.peer_ids}
    assert tried == leaders


class _OneAlwaysFails(Simulation):
    """The averaging of the first member fails in every attempt; others hear of it by its message,
    or, before that, by its streams.
    """

    by_streams = False

    def _reduce(self, peer: str, effect: rt.StartReduce) -> None:
        if PEERS[0] not in {m.contribution.peer_id for m in effect.group.members}:
            super()._reduce(peer, effect)
        elif peer == PEERS[0]:
            event = rt.ReduceFailed(effect.attempt, "averaging failed: MemoryError")
            self._at(0.1, self._living(peer, lambda: self._tell(peer, event)))
        elif self.by_streams:
            event = rt.ReduceFailed(effect.attempt, "peer0: failed", told_by=PEERS[0])
            self._at(0.1, self._living(peer, lambda: self._tell(peer, event)))


@pytest.mark.parametrize("by_streams", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_member_whose_averaging_always_fails_does_not_stop_the_swarm(
    seed: int, by_streams: bool
) -> None:
    simulation = _OneAlwaysFails(seed, World(num_members=5))
    simulation.by_streams = by_streams
    simulation.run(until_seconds=600.0)
    assert len(simulation.values) == 1
