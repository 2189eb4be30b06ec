"""The shell of the round machine: carries out its effects, in order, and feeds it what comes back.

One task handles one event at a time, so the machine, the replica and the durable record are never
raced for. `Persist` is on disk before the effect after it. What takes long (averaging, fetching,
calling) runs in tasks of its own and comes back as an event, marked with its place so that news for
a finished step is dropped.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from peer.background import BackgroundTasks
from peer.ipc import AsyncChannel
from peer.swarm import round_types as rt
from peer.swarm.allreduce import ReduceError, Reduction
from peer.swarm.buffer_pool import BufferPool
from peer.swarm.codecs import EncodedVector
from peer.swarm.contacts import Contacts
from peer.swarm.contribution_check import LeaseRules, SignedChecks
from peer.swarm.coordinator_questions import CoordinatorQuestions, Place, Post
from peer.swarm.delivery import Delivery
from peer.swarm.latecomers import LEAST_SILENCE_SECONDS, Latecomers, late_in_failed
from peer.swarm.pace import MOST_REDUCE_SECONDS, Pace
from peer.swarm.reduction_desk import ReductionDesk
from peer.swarm.replica import Replica
from peer.swarm.round_state import RoundMachine
from peer.swarm.state_transfer import fetch_averaged
from peer.swarm.timeline import TimelineRecorder
from peer.swarm.transport import Transport
from peer.swarm.vote_file import VoteFile
from protos.contract.digest import num_pieces
from protos.contract.signing import SigningKey
from protos.contract.telemetry import AttemptOutcome, RoundPhase
from protos.muster.v1 import common_pb2

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.1
_FINISH_SECONDS = 3.0
_MOVES_SECONDS = 1.0


class RoundShell:
    """Runs the machine of the current step."""

    def __init__(
        self,
        *,
        replica: Replica,
        transport: Transport,
        channel: AsyncChannel,
        key: SigningKey,
        votes: VoteFile,
        desk: ReductionDesk,
        post: Post,
        tasks: BackgroundTasks,
    ) -> None:
        self._replica, self._transport, self._channel = replica, transport, channel
        self._key, self._desk, self._post = key, desk, post
        self.votes = votes
        self.machine: RoundMachine | None = None
        self.pace = Pace()
        self.contacts = Contacts(self.pace)
        self.delivery = Delivery(transport, self.contacts, post)
        self._latecomers = Latecomers()
        self._committed_seconds = time.monotonic()
        self.on_phase: Callable[[RoundPhase, int], None] | None = None
        """Called with (phase, attempt) when a phase of the round begins, before its work."""
        self.seconds_by_phase: dict[str, float] = {}
        """Durations in the last attempt that ended."""
        self.committed: rt.Commit | None = None
        """Set when the machine has decided; the node applies it."""
        self.behind: rt.Behind | None = None
        self.refused_reason = ""
        self._checks: SignedChecks | None = None
        self._own: rt.OwnContribution | None = None
        self._own_encoded: EncodedVector | None = None
        self._reduction: asyncio.Task[None] | None = None
        self._current: Reduction | None = None
        self._stall_seconds = self.pace.stall_seconds()
        self._buffers = BufferPool()
        self._fetching: set[tuple[bytes, tuple[str, ...]]] = set()
        """Averaged digests, and who was asked for them."""
        self._tasks = tasks
        self.questions = CoordinatorQuestions(channel, own_peer_id=key.peer_id, post=post)
        self._timeline = TimelineRecorder(incarnation=0, outer_step=0)
        self._unix_offset_seconds = time.time() - time.monotonic()

    # Life of a step ---------------------------------------------------------------------------

    @property
    def place(self) -> Place | None:
        """(incarnation, outer step) under way."""
        if self.machine is None:
            return None
        return (self.machine.setup.incarnation, self.machine.setup.outer_step)

    @property
    def own(self) -> rt.OwnContribution | None:
        """What this member brings into the step under way."""
        return self._own

    @property
    def has_work(self) -> bool:
        """True if that is a contribution, not the word of an idle member."""
        return self._own is not None and len(self._own.contribution.ranges) > 0

    @property
    def checks(self) -> SignedChecks | None:
        """Rules of the step under way."""
        return self._checks

    async def begin(self, directive: common_pb2.Directive) -> None:
        """Begin the step after the state held."""
        replica = self._replica
        meta = replica.meta
        assert meta is not None
        rules = LeaseRules(
            run_id=replica.run_id,
            incarnation=meta.incarnation,
            directive=directive,
            cursor_by_peer=meta.lease_cursor_by_peer,
            seq_len=replica.seq_len,
            coordinator_public_key=replica.coordinator_public_key,
        )
        self._checks = SignedChecks(key=self._key, rules=rules)
        pieces = num_pieces(replica.contribution.size)
        self._own, self.seconds_by_phase = None, {}
        self.committed, self.behind, self.refused_reason = None, None, ""
        self.contacts.keep_only({entry.peer_id for entry in directive.roster})
        self._fetching.clear()
        self._timeline = TimelineRecorder(
            incarnation=meta.incarnation, outer_step=meta.outer_step + 1
        )
        self.machine = RoundMachine(
            setup=rt.RoundSetup(
                run_id=replica.run_id,
                incarnation=meta.incarnation,
                outer_step=meta.outer_step + 1,
                own_peer_id=self._key.peer_id,
                directive=directive,
                previous_state_digest=replica.state_digest,
                num_pieces=pieces,
                vector_bytes=replica.codec.encoded_bytes(replica.contribution.size),
                left_out=self._latecomers.left_out,
                on_trial=self._latecomers.on_trial,
            ),
            checks=self._checks,
            timing=self.pace.timing(),
            record=self.votes.record(meta.outer_step + 1),
            newest_directive=replica.newest_directive(),
            now_seconds=time.monotonic(),
        )
        for digest in replica.held_digests():
            self.machine.hold_bytes(digest)
        await self.handle(rt.Tick())

    def end(self) -> None:
        """Leave the step, decided or not."""
        self.machine = None
        self._own, self._own_encoded = None, None
        self._abort_reduction("the step has ended")

    async def finish_reduction(self) -> None:
        """The step is decided while we still average: a moment of patience saves fetching the
        bytes.
        """
        if self._reduction is not None:
            await asyncio.wait({self._reduction}, timeout=_FINISH_SECONDS)

    async def contribute(
        self, own: rt.OwnContribution | None, encoded: EncodedVector | None = None
    ) -> None:
        """The own contribution for this step is frozen (or an empty one withdrawn).

        `encoded` is what it brings, if it has ranges.
        """
        if own is not None:
            meter = self._transport.link_meter
            limit = self._transport.upload_pacer.bytes_per_second
            upload = meter.upload_bytes_per_second
            own = replace(
                own,
                upload_bytes_per_second=min(upload or limit, limit) if limit else upload,
                download_bytes_per_second=meter.download_bytes_per_second,
            )
        self._own, self._own_encoded = own, encoded
        if own is not None and own.contribution.ranges and self._timeline.phase is None:
            self._enter(RoundPhase.FORM)
        await self.handle(rt.Contributed(own))

    async def handle(self, event: rt.Event) -> None:
        """Feed one event and carry out what the machine asks for."""
        if self.machine is None:
            return
        for effect in self.machine.handle(event, now_seconds=time.monotonic()):
            await self._do(effect)

    # Effects ----------------------------------------------------------------------------------

    async def _do(self, effect: rt.Effect) -> None:
        match effect:
            case rt.Persist():
                await asyncio.to_thread(self.votes.write, effect.record)
            case rt.Send():
                for peer_id in effect.peer_ids:
                    self._tasks.start(self.delivery.deliver(peer_id, effect.message))
            case rt.StartReduce():
                self._start_reduction(effect)
            case rt.AbortReduce():
                self._abort_reduction(effect.reason)
            case rt.FetchBytes():
                self._tasks.start(self._fetch(effect, self._place()))
            case rt.AskCoordinatorExchange() | rt.SubmitVotes():
                self.questions.ask(effect, self._place())
            case rt.Commit():
                self._enter(RoundPhase.APPLY)
                self.committed = effect
            case rt.Behind():
                self.behind = effect
            case rt.ContributionRefused():
                self.refused_reason = effect.reason
                self._own = self._own_encoded = None
            case rt.AttemptDiscarded():
                self._tell_discarded(effect)
            case rt.PhaseChanged():
                self._show_phase(effect)

    def _tell_discarded(self, effect: rt.AttemptDiscarded) -> None:
        self._channel.send(
            "attempt_discarded",
            outer_step=self._place()[1],
            attempt=effect.attempt,
            reason=effect.reason,
        )
        self._post(self._place(), rt.TimingLearnt(self.pace.timing()))
        if self._timeline.phase is not None:
            self.end_attempt(AttemptOutcome.DISCARDED, attempt=effect.attempt, reason=effect.reason)

    def _show_phase(self, effect: rt.PhaseChanged) -> None:
        """Book the phase and tell people; the machine's REDUCE begins with the exchange of
        pieces.
        """
        if effect.phase is rt.RoundPhase.DONE:
            return
        shown = RoundPhase(effect.phase.value)
        if shown is RoundPhase.REDUCE:
            shown = RoundPhase.EXCHANGE
        is_begun = self._timeline.phase is not None or shown is not RoundPhase.FORM
        if shown is not RoundPhase.NO_QUORUM and (is_begun or self._is_later_attempt()):
            self._enter(shown)
        self._channel.send("phase", phase=shown.value, reason=effect.reason)

    def _place(self) -> Place:
        place = self.place
        assert place is not None
        return place

    # Timeline ---------------------------------------------------------------------------------

    def _is_later_attempt(self) -> bool:
        return self.machine is not None and self.machine.attempt > 0

    def _now_unix_seconds(self) -> float:
        return time.monotonic() + self._unix_offset_seconds

    def _enter(self, phase: RoundPhase) -> None:
        """A phase begins, unless it is under way already."""
        if phase is self._timeline.phase:
            return
        if self.on_phase is not None and self.machine is not None:
            self.on_phase(phase, self.machine.attempt)
        moved = self._transport.moved_by_peer()
        self._timeline.enter(phase, now_unix_seconds=self._now_unix_seconds(), moved=moved)

    def end_attempt(self, outcome: AttemptOutcome, *, attempt: int, reason: str) -> None:
        """Tell the timeline of the attempt that ends, and learn from it if it committed."""
        timeline = self._timeline.end(
            outcome,
            attempt=attempt,
            reason=reason,
            now_unix_seconds=self._now_unix_seconds(),
            moved=self._transport.moved_by_peer(),
            ways=self._transport.ways(),
        )
        self.seconds_by_phase = seconds = timeline.seconds_by_phase()
        if outcome is AttemptOutcome.COMMITTED:
            self._learn_who_is_late()
        if outcome is AttemptOutcome.COMMITTED and "exchange" in seconds and "form" in seconds:
            averaging_seconds = seconds["exchange"] + seconds.get("reduce", 0.0)
            self.pace.add(
                form_seconds=seconds["form"],
                reduce_seconds=averaging_seconds,
                agree_seconds=seconds.get("agree", 0.0),
            )
        self._channel.send("attempt_timeline", **timeline.to_plain())

    # Averaging --------------------------------------------------------------------------------

    def _start_reduction(self, effect: rt.StartReduce) -> None:
        self._abort_reduction("superseded")
        assert self._checks is not None
        incarnation, outer_step = self._place()
        contributions = [member.contribution for member in effect.group.members]
        tokens = {c.peer_id: self._checks.check_contribution(c).num_tokens for c in contributions}
        reduction = Reduction(
            self._transport,
            place=(incarnation, outer_step, effect.attempt),
            group=effect.group,
            tokens_by_peer=tokens,
            own_peer_id=self._key.peer_id,
            codec=self._replica.codec,
            num_values=self._replica.contribution.size,
            own=self._own_encoded,
            on_exchanged=self._exchanged,
            buffers=self._buffers,
        )
        self._desk.open(reduction)
        self._transport.link_meter.begin(time.monotonic())
        self._current = reduction
        self._reduction = self._tasks.start(self._reduce(reduction, effect.attempt))
        if not self.pace.is_learnt:
            self._tasks.start(self._watch_moves(reduction))

    async def _reduce(self, reduction: Reduction, attempt: int) -> None:
        place = self._place()
        watching = asyncio.ensure_future(self._watch_silence(reduction))
        try:
            averaged = await reduction.run()
        except ReduceError as error:
            self._note_silent(reduction)
            failed = rt.ReduceFailed(
                attempt,
                str(error),
                error.peer_id,
                told_by=error.told_by,
                is_down=error.is_down,
                is_invalid=error.is_invalid,
            )
            self._post(place, failed)
            return
        finally:
            watching.cancel()
        self._transport.link_meter.end()
        if reduction.longest_wait_seconds > 0.0:  # a member alone learns nothing of others
            self.pace.add_wait(reduction.longest_wait_seconds)
        await asyncio.to_thread(self._replica.hold_averaged, averaged)
        self._post(place, rt.ReduceDone(attempt, averaged.averaged_digest))

    def _exchanged(self) -> None:
        if self._timeline.phase is RoundPhase.EXCHANGE:
            self._enter(RoundPhase.REDUCE)
            reason = "own part of the vector is averaged, waiting for the others'"
            self._channel.send("phase", phase=RoundPhase.REDUCE.value, reason=reason)

    async def _watch_silence(self, reduction: Reduction) -> None:
        """A member that is connected but stopped is only found by what it does not send."""
        num_failed = self.machine.num_failed_reductions if self.machine is not None else 0
        self._stall_seconds = self.pace.stall_seconds(num_failed)
        while True:
            await asyncio.sleep(TICK_SECONDS)
            reduction.tick()
            peer_id, seconds = reduction.silent_peer(self._stall_seconds)
            if peer_id:
                reason = f"{peer_id} has sent nothing for {seconds:.1f} s"
                reduction.fail(ReduceError(reason, peer_id=peer_id, is_down=True))
                return

    async def _watch_moves(self, reduction: Reduction) -> None:
        """No round was measured yet, so an attempt lasts as long as bytes move, also those that
        others still fetch from here after our own are complete.
        """
        place, attempt, num_moved = reduction.place[:2], reduction.place[2], 0
        end_seconds = reduction.begin_seconds + MOST_REDUCE_SECONDS
        while place == self.place and self._current is reduction and not reduction.has_failed:
            if time.monotonic() >= end_seconds:
                return
            if reduction.num_moved != num_moved:
                num_moved = reduction.num_moved
                self._post(place, rt.ReduceMoved(attempt))
            await asyncio.sleep(_MOVES_SECONDS)

    def _abort_reduction(self, reason: str) -> None:
        if self._reduction is not None and not self._reduction.done():
            logger.debug("averaging stopped: %s", reason)
            if self._current is not None:
                self._note_silent(self._current)
            if self._current is None or not self._current.has_failed:
                self._reduction.cancel()
            if self._current is not None:  # a failure of its own is still told to the machine
                self._current.fail(ReduceError(f"averaging was given up: {reason}"))
            self._desk.open(None)
        self._reduction = None

    def _note_silent(self, reduction: Reduction) -> None:
        """A reduction has failed, here or elsewhere: whoever is silent here as well is late and not
        waited for in the next attempt, and whom it has waited for most is late, too.
        """
        incarnation, outer_step, attempt = reduction.place
        patience_seconds = max(LEAST_SILENCE_SECONDS, self._stall_seconds / 2)
        elapsed_seconds = time.monotonic() - reduction.begin_seconds
        late = late_in_failed(reduction.late_seconds_by_peer, elapsed_seconds=elapsed_seconds)
        peer_id, seconds = reduction.silent_peer(patience_seconds)
        if peer_id:
            late |= {peer_id}
            reason = f"has sent nothing for {seconds:.1f} s"
            self._post((incarnation, outer_step), rt.PeerUnreachable(peer_id, reason))
        waiting = late_in_failed(reduction.waiting_seconds_by_peer, elapsed_seconds=elapsed_seconds)
        if late or waiting:
            only_waiting = "" if late else min(waiting)
            self._post((incarnation, outer_step), rt.PeersLate(attempt, late, only_waiting))

    def _learn_who_is_late(self) -> None:
        """A step is certified: what that says of slow members."""
        now, current = time.monotonic(), self._current
        round_seconds, self._committed_seconds = now - self._committed_seconds, now
        self.pace.add_round(round_seconds)
        is_learnt = self.pace.is_learnt  # else it was late for a guess: that ends with the step
        is_ours = current is not None and current.place[:2] == self.place
        late = self._latecomers.step_ended(
            late=self.machine.late if self.machine is not None and is_learnt else (),
            tokens_by_peer=current.tokens_by_peer if current is not None and is_ours else {},
            late_seconds_by_peer=current.late_seconds_by_peer if current and is_ours else {},
            round_seconds=round_seconds,
        )
        if late:
            logger.warning("left out for some steps, the link is too slow: %s", ", ".join(late))

    async def _fetch(self, effect: rt.FetchBytes, place: Place) -> None:
        digest, fetch = effect.averaged_digest, (effect.averaged_digest, effect.holders)
        if fetch in self._fetching:
            return

        def silent(peer_id: str, begin_seconds: float, reason: str) -> None:
            if not self.contacts.is_heard_since(peer_id, begin_seconds):
                self._post(place, rt.PeerUnreachable(peer_id, reason))

        self._fetching.add(fetch)
        try:
            averaged = self._replica.averaged(digest)
            if averaged is None:
                holders = [p for p in effect.holders if p != self._key.peer_id]
                averaged = await fetch_averaged(
                    self._transport,
                    holders,
                    digest,
                    codec_name=self._replica.codec.name,
                    num_values=self._replica.contribution_values(place[1]),
                    on_silent=silent,
                )
                if averaged is None:
                    return
                if self._replica.averaged(digest) is None:  # others may have been asked meanwhile
                    await asyncio.to_thread(self._replica.hold_averaged, averaged)
            self._post(place, rt.BytesFetched(digest))
        finally:
            self._fetching.discard(fetch)
