"""The leader's side of an attempt: exchange, form, propose again.

Before the first message of an attempt that only its leader may send, `led_attempt` is persisted, so
that a leader that crashed never leads the same attempt twice with other content.
"""

from collections.abc import Mapping
from typing import Protocol

from peer.swarm.round_core import RoundCore
from peer.swarm.round_proposer import (
    Proposer,
    Stage,
    build_group,
    choose_from_answers,
    decide_form,
    leader_of,
    possible_leaders,
)
from peer.swarm.round_types import AskCoordinatorExchange, Proposal, RoundPhase
from protos.contract.certificate import contributions_digest
from protos.contract.ids import COORDINATOR_VOTER
from protos.muster.v1 import common_pb2, rounds_pb2

_RESYNC = rounds_pb2.REFUSAL_KIND_RESYNC
_SUPERSEDED = rounds_pb2.REFUSAL_KIND_SUPERSEDED
_INVALID = rounds_pb2.REFUSAL_KIND_INVALID
_DIGEST_BYTES = 32
_LEADING_BODIES = frozenset(("exchange_request", "form_group", "repropose", "nudge"))


class Outcomes(Protocol):
    """What the member's side does with the leader's decisions, as any member would."""

    def accept_group(self, attempt: int, group: rounds_pb2.FormGroup) -> None:
        """Average with the group."""

    def consider(self, proposal: Proposal) -> None:
        """Fetch, check, vote."""

    def follow(self, sender: str, attempt: int, reason: str) -> None:
        """Go on to a later attempt that a member asks for, if we can be spared in this one."""


class LeaderSide:
    """Leads those attempts whose hash falls on this member."""

    def __init__(self, core: RoundCore, outcomes: Outcomes) -> None:
        self._core = core
        self._outcomes = outcomes
        self._leaders: dict[int, str] = {}
        self._later_joins: dict[str, tuple[int, rounds_pb2.JoinGroup]] = {}
        self._heard_attempts: set[int] = set()
        """Attempts, after the first, that their leader has begun to lead as far as we know."""
        self.proposer: Proposer | None = None

    def leader(self, attempt: int) -> str:
        """Who leads an attempt of this step."""
        if attempt not in self._leaders:
            setup = self._core.setup
            self._leaders[attempt] = leader_of(
                self._core.roster,
                incarnation=setup.incarnation,
                outer_step=setup.outer_step,
                attempt=attempt,
            )
        return self._leaders[attempt]

    def is_own(self, attempt: int) -> bool:
        """True if this member leads the attempt and has not done so before a crash."""
        return self.leader(attempt) == self._core.setup.own_peer_id

    def hear(self, sender: str, attempt: int, body: str | None) -> bool:
        """True if the sender leads the attempt; if it says so itself, the attempt is heard of."""
        is_leader = sender == self.leader(attempt)
        if is_leader and attempt > 0 and body in _LEADING_BODIES:
            self._heard_attempts.add(attempt)
        return is_leader

    def may_supersede(self, sender: str, attempt: int) -> bool:
        """True if the sender may say that our attempt is over: it leads it, or we have asked it
        ourselves as leader; and nothing has come of it yet.
        """
        is_current = attempt == self._core.attempt and self._core.phase is RoundPhase.FORM
        return is_current and (sender == self.leader(attempt) or self.is_own(attempt))

    def is_passed_over(self, attempt: int) -> bool:
        """True if nobody should wait for an attempt's leader: unreachable, accused or left out,
        while another may lead. Slowness alone does not pass over a leader that has been heard in
        the attempt: two that leave each other out would overtake one another without end.
        """
        core, peer_id = self._core, self.leader(attempt)
        leaders = {entry.peer_id for entry in possible_leaders(core.roster)}
        is_gone = peer_id in core.not_awaited and bool(leaders - core.not_awaited)
        if peer_id not in core.left_out or attempt in self._heard_attempts:
            return is_gone
        return is_gone or bool(leaders - core.left_out - core.not_awaited)

    def enter(self, now_seconds: float) -> None:
        """The member's attempt has changed: begin to lead it if it is ours."""
        core, self.proposer = self._core, None
        if not self.is_own(core.attempt) or core.record.led_attempt >= core.attempt:
            return
        stage = Stage.FORM if core.attempt == 0 else Stage.EXCHANGE
        self.proposer = Proposer(attempt=core.attempt, begin_seconds=now_seconds, stage=stage)
        for peer_id, (attempt, join) in list(self._later_joins.items()):
            if attempt <= core.attempt:
                del self._later_joins[peer_id]
            if attempt == core.attempt:
                self._admit(peer_id, join)
        if stage is Stage.EXCHANGE:
            core.persist(
                led_attempt=core.attempt,
                promised_attempt=max(core.record.promised_attempt, core.attempt),
            )
            self.proposer.answers[core.setup.own_peer_id] = core.exchange_answer()
            core.send(
                core.others, attempt=core.attempt, exchange_request=rounds_pb2.ExchangeRequest()
            )
            self._check_exchange()

    def join_own(self) -> None:
        """The own contribution is there, or the attempt has changed with it there."""
        core = self._core
        if self.proposer is not None and core.own is not None:
            self._admit(core.setup.own_peer_id, own_join(core))

    def on_join(self, sender: str, attempt: int, join: rounds_pb2.JoinGroup) -> None:
        """A due member wants to be in the group."""
        core = self._core
        if not self.is_own(attempt):
            return
        core.learn_directive(join.newest_directive)
        if join.previous_state_digest != core.setup.previous_state_digest:
            reason = (
                f"your state before outer step {core.setup.outer_step} differs from the leader's"
            )
            core.refuse(sender, attempt=attempt, kind=_RESYNC, reason=reason)
            return
        problem = self._problem_with(sender, join)
        if problem:
            core.refuse(sender, attempt=attempt, kind=_INVALID, reason=problem)
        elif attempt > core.attempt:
            self._later_joins[sender] = (attempt, join)
            self._outcomes.follow(sender, attempt, f"{sender} asks for attempt {attempt}")
        elif attempt < core.attempt or self.proposer is None:
            later = max(core.attempt, core.record.led_attempt + 1)
            reason = f"attempt {attempt} is over, {later} is next"
            core.refuse(sender, attempt=attempt, kind=_SUPERSEDED, reason=reason, to_attempt=later)
        else:
            self._answer_join(sender, join)

    def _problem_with(self, sender: str, join: rounds_pb2.JoinGroup) -> str:
        core = self._core
        if join.contribution.peer_id != sender:
            return f"contribution names {join.contribution.peer_id}, not the sender"
        if reason := core.accusations.reason_against(sender):
            return f"left out of outer step {core.setup.outer_step}: {reason}"
        wanted = core.setup.num_pieces if join.contribution.ranges else 0
        if len(join.piece_digests) != wanted:
            return f"{len(join.piece_digests)} piece digests; {wanted} are needed"
        if any(len(digest) > _DIGEST_BYTES for digest in join.piece_digests):
            return f"a piece digest of more than {_DIGEST_BYTES} bytes"
        return core.checks.check_contribution(join.contribution).reason

    def _answer_join(self, sender: str, join: rounds_pb2.JoinGroup) -> None:
        proposer, core = self.proposer, self._core
        assert proposer is not None
        if proposer.repropose is not None:
            core.send((sender,), attempt=proposer.attempt, repropose=proposer.repropose)
        elif proposer.group is None:
            self._admit(sender, join)
        elif sender in {m.contribution.peer_id for m in proposer.group.members}:
            core.send((sender,), attempt=proposer.attempt, form_group=proposer.group)

    def _admit(self, peer_id: str, join: rounds_pb2.JoinGroup) -> None:
        proposer = self.proposer
        if proposer is not None and proposer.group is None:
            proposer.joins[peer_id] = _for_group(join)
            verdict = self._core.checks.check_contribution(join.contribution)
            proposer.tokens_by_peer[peer_id] = verdict.num_tokens

    # Form -------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """True if somebody in the attempt brings tokens."""
        return self.proposer is not None and any(self.proposer.tokens_by_peer.values())

    def try_form(self, now_seconds: float, deadline_seconds: float) -> tuple[str, ...]:
        """Form the group if it is time; returns members to nudge otherwise."""
        core, proposer = self._core, self.proposer
        if proposer is None or proposer.stage is not Stage.FORM:
            return ()
        if core.is_paused:
            core.show(RoundPhase.FORM, f"directive {core.newest_number} pauses the run")
            return ()
        for peer_id in core.not_awaited & set(proposer.joins):
            del proposer.joins[peer_id]
        if core.accusations.reason_against(core.setup.own_peer_id):
            self._admit(core.setup.own_peer_id, own_join(core))  # without anything of ours
        left_out = self._left_out(proposer)
        parked = {p: proposer.joins.pop(p) for p in left_out & set(proposer.joins)}
        decision = decide_form(
            proposer,
            roster=[entry for entry in core.roster if entry.peer_id not in left_out],
            own_peer_id=core.setup.own_peer_id,
            unreachable=core.not_awaited,
            at_step=core.at_step,
            now_seconds=now_seconds,
            deadline_seconds=deadline_seconds,
        )
        if not decision.is_formed:
            proposer.joins.update(parked)
            core.show(RoundPhase.FORM, decision.reason.partition(" another ")[0])
            return tuple(p for p in core.others if p not in proposer.joins)
        if core.setup.own_peer_id not in proposer.joins:
            self._admit(core.setup.own_peer_id, own_join(core))
        group = build_group(
            proposer,
            entry_by_peer=core.entry_by_peer,
            num_pieces=core.setup.num_pieces,
            next_directive=core.newest_directive,
        )
        proposer.stage, proposer.group = Stage.FORMED, group
        if core.record.led_attempt < proposer.attempt:
            core.persist(led_attempt=proposer.attempt)
        members = {member.contribution.peer_id for member in group.members}
        invited = tuple(peer for peer in core.others if peer in members)
        core.send(invited, attempt=proposer.attempt, form_group=group)
        self._outcomes.accept_group(proposer.attempt, group)
        return ()

    def _left_out(self, proposer: Proposer) -> frozenset[str]:
        """Whom not to wait for; nobody, if only the slow have brought work."""
        left_out = self._core.left_out - {self._core.setup.own_peer_id}
        bringing = {peer for peer in proposer.joins if proposer.tokens_by_peer.get(peer, 0)}
        return left_out if bringing - left_out else frozenset()

    # Exchange ---------------------------------------------------------------------------------

    def on_exchange_answer(
        self, sender: str, attempt: int, answer: rounds_pb2.ExchangeAnswer
    ) -> None:
        """A member has promised this attempt and says what it voted."""
        core, proposer = self._core, self.proposer
        core.learn_directive(answer.newest_directive)
        if proposer is None or proposer.stage is not Stage.EXCHANGE or attempt != proposer.attempt:
            return
        if answer.HasField("highest_vote"):
            vote = answer.highest_vote
            value = rounds_pb2.RoundValue.FromString(vote.value)
            if (
                vote.voter != sender
                or vote.attempt >= attempt
                or not core.names_this_round(vote.value)
                or not core.checks.is_valid_vote(vote)
                or contributions_digest(answer.contributions) != value.contributions_digest
            ):
                reason = "the vote in the exchange's answer is not valid"
                core.refuse(sender, attempt=attempt, kind=_INVALID, reason=reason)
                return
            core.votes.add(vote, current_attempt=core.attempt)
        proposer.answers[sender] = answer
        self._check_exchange()

    def on_coordinator(
        self, attempt: int, response: rounds_pb2.CoordinatorExchangeResponse | None
    ) -> None:
        """The coordinator's half of an exchange."""
        if response is not None and response.is_promised:
            self.on_exchange_answer(COORDINATOR_VOTER, attempt, response.answer)

    def _check_exchange(self) -> None:
        core, proposer = self._core, self.proposer
        assert proposer is not None
        if not core.votes.is_quorum(proposer.answers):
            return
        choice = choose_from_answers(proposer.answers)
        if choice.equivocation:
            proposer.stage = Stage.STUCK
            core.show(RoundPhase.NO_QUORUM, choice.equivocation)
        elif choice.vote is None or choice.answer is None:
            proposer.stage = Stage.FORM
            self.join_own()
        else:
            value = rounds_pb2.RoundValue.FromString(choice.vote.value)
            directive = _content(choice.answer, core.directive_by_number, value)
            proposer.stage = Stage.REPROPOSED
            proposer.repropose = rounds_pb2.Repropose(
                value=choice.vote.value,
                contributions=choice.answer.contributions,
                next_directive=directive,
                holders=[peer for peer in choice.holders if peer != COORDINATOR_VOTER],
            )
            core.send(core.others, attempt=proposer.attempt, repropose=proposer.repropose)
            self._outcomes.consider(proposal_from(proposer.repropose, proposer.attempt))

    def ask_again(self, now_seconds: float) -> None:
        """Repeat what has not been answered."""
        core, proposer = self._core, self.proposer
        if proposer is None:
            return
        if proposer.stage is Stage.REPROPOSED and proposer.repropose is not None:
            core.send(core.others, attempt=proposer.attempt, repropose=proposer.repropose)
        if proposer.stage is not Stage.EXCHANGE:
            return
        silent = tuple(peer for peer in core.others if peer not in proposer.answers)
        request = rounds_pb2.ExchangeRequest()
        core.send(silent, attempt=proposer.attempt, exchange_request=request)
        will_answer = set(proposer.answers) | (set(core.others) - core.unreachable)
        waited_seconds = now_seconds - proposer.begin_seconds
        is_late = waited_seconds >= core.timing.exchange_wait_seconds
        if (is_late or not core.votes.is_quorum(will_answer)) and (
            now_seconds >= proposer.next_ask_seconds
        ):
            proposer.next_ask_seconds = now_seconds + core.timing.exchange_wait_seconds
            core.emit(AskCoordinatorExchange(proposer.attempt))
        if is_late:
            reason = f"exchange of attempt {proposer.attempt} has "
            core.show(RoundPhase.NO_QUORUM, reason + core.votes.explain(proposer.answers))

    def repropose_to(self, sender: str) -> None:
        """A member could not finish the reduction that we finished: let it fetch the bytes and
        vote.
        """
        record, core = self._core.record, self._core
        vote = record.highest_vote
        if vote is not None and record.next_directive is not None and vote.attempt == core.attempt:
            again = rounds_pb2.Repropose(
                value=vote.value,
                contributions=record.contributions,
                next_directive=record.next_directive,
                holders=[core.setup.own_peer_id],
            )
            core.send((sender,), attempt=vote.attempt, repropose=again)


def own_join(core: RoundCore) -> rounds_pb2.JoinGroup:
    """The own JoinGroup; empty if nothing is contributed."""
    own = core.own
    contribution = rounds_pb2.Contribution(peer_id=core.setup.own_peer_id)
    return rounds_pb2.JoinGroup(
        previous_state_digest=core.setup.previous_state_digest,
        contribution=own.contribution if own is not None else contribution,
        piece_digests=own.piece_digests if own is not None else (),
        newest_directive=core.newest_directive,
        upload_bytes_per_second=int(own.upload_bytes_per_second) if own is not None else 0,
        download_bytes_per_second=int(own.download_bytes_per_second) if own is not None else 0,
    )


def _hidden_reducers(core: RoundCore, group: rounds_pb2.FormGroup) -> set[str]:
    """Members that are to reduce although they accept no connections and others do: they would be
    late for everybody (reduce_slices.py).
    """
    peer_ids = [member.contribution.peer_id for member in group.members]
    ends = list(group.reducer_piece_ends)
    runs = zip(peer_ids, [0, *ends[:-1]], ends, strict=True)
    reducing = {peer_id for peer_id, begin, end in runs if begin < end}
    entries = [entry for entry in core.roster if entry.peer_id in peer_ids]
    able = {entry.peer_id for entry in entries if entry.can_accept_connections}
    return reducing - able if able else set()


def _for_group(join: rounds_pb2.JoinGroup) -> rounds_pb2.JoinGroup:
    """A join without what only its leader reads, or nobody: a group carries those of all members,
    and one that is too large to be sent would hold all of them up.
    """
    bare = rounds_pb2.JoinGroup()
    bare.CopyFrom(join)
    bare.ClearField("newest_directive")
    bare.DiscardUnknownFields()
    return bare


def problem_with_group(
    core: RoundCore, group: rounds_pb2.FormGroup, *, leader: str
) -> tuple[str, str]:
    """What is wrong with a leader's group, and whose doing it surely is; ("", "") if nothing.

    Of a join that no leader takes in it is the leader's doing: that it is the member's is only the
    leader's word.
    """
    ends = list(group.reducer_piece_ends)
    if len(ends) != len(group.members) or ends != sorted(ends):
        return "piece ranges do not follow one another", ""
    if not ends or ends[-1] != core.setup.num_pieces:
        return f"pieces end at {ends[-1:]}, not at {core.setup.num_pieces}", ""
    if core.learn_directive(group.next_directive) is None:
        return "next directive is older than the one in force or not signed", ""
    if hidden := _hidden_reducers(core, group):
        return f"{min(hidden)} cannot be dialled and is to reduce", leader
    for member in group.members:
        peer_id, num_pieces = member.contribution.peer_id, len(member.piece_digests)
        if member.previous_state_digest != core.setup.previous_state_digest:
            return f"{peer_id} continues another state", ""
        wanted = core.setup.num_pieces if member.contribution.ranges else 0
        if num_pieces != wanted:
            return f"{peer_id} committed {num_pieces} piece digests; {wanted} are needed", leader
        if peer_id == core.setup.own_peer_id and member.contribution.ranges:
            own = own_join(core)
            if (member.contribution, list(member.piece_digests)) != (
                own.contribution,
                list(own.piece_digests),
            ):
                return "our own contribution is not what we bring", ""
    return core.check_contributions([member.contribution for member in group.members]), ""


def proposal_from(repropose: rounds_pb2.Repropose, attempt: int) -> Proposal:
    """The same as a proposal."""
    return Proposal(
        value=repropose.value,
        attempt=attempt,
        contributions=repropose.contributions,
        next_directive=repropose.next_directive,
        holders=tuple(repropose.holders),
    )


def _content(
    answer: rounds_pb2.ExchangeAnswer,
    known: Mapping[int, common_pb2.Signed],
    value: rounds_pb2.RoundValue,
) -> common_pb2.Signed:
    """Content of the directive that a voted value names: from the answer, else what is known of
    it.
    """
    if answer.HasField("next_directive"):
        return answer.next_directive
    return known.get(value.next_directive_number, answer.newest_directive)
