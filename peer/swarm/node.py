"""The swarm process: one task owns replica, round and record; everything else posts to its queue.

It settles first (newest incarnation, its base, the newest state), then runs the round of the next
step, and reports what happens to the daemon. Order of reports after a step: `state`,
`certificates`, `round_outcome`.
"""

import asyncio
import logging
import time

from peer.background import BackgroundTasks
from peer.ipc import AsyncChannel, ChannelClosed, Message
from peer.shared_vectors import SharedVectors
from peer.swarm import round_types as rt
from peer.swarm.ahead_claims import AheadClaims
from peer.swarm.catch_up import CatchUp
from peer.swarm.config_message import SwarmConfig
from peer.swarm.coordinator_questions import Place
from peer.swarm.delivery import ROUND_CALL
from peer.swarm.dht import Dht
from peer.swarm.early_events import EarlyEvents
from peer.swarm.event_queue import EventQueue
from peer.swarm.offers import Offers
from peer.swarm.presence import keep_presence
from peer.swarm.record_file import load_record, run_folder_name, save_record
from peer.swarm.reduction_desk import ReductionDesk
from peer.swarm.replica import Replica
from peer.swarm.reports import Reporter
from peer.swarm.round_shell import TICK_SECONDS, RoundShell
from peer.swarm.state_server import StateServer
from peer.swarm.transport import Transport
from peer.swarm.turns import tell_turns
from peer.swarm.vote_file import VoteFile
from protos.contract.telemetry import AttemptOutcome, RoundOutcome
from protos.muster.v1 import common_pb2, rounds_pb2

logger = logging.getLogger(__name__)

_SETTLE_SECONDS = 1.0
_ASK_CHECKPOINT_SECONDS = 5.0


class SwarmNode:
    """One member of the swarm, as long as its process lives."""

    def __init__(
        self,
        *,
        config: SwarmConfig,
        channel: AsyncChannel,
        vectors: SharedVectors,
        transport: Transport,
        dht: Dht,
    ) -> None:
        self._config, self._channel, self._vectors = config, channel, vectors
        self._transport, self._dht = transport, dht
        self._own_peer_id: str = config.key.peer_id
        run_folder = run_folder_name(config.run_id, config.coordinator_public_key)
        self._votes_folder = config.home / "votes" / run_folder
        self._replica = Replica(
            spec=config.spec,
            run_id=config.run_id,
            key=config.key,
            coordinator_public_key=config.coordinator_public_key,
            vectors=vectors,
            folder=config.home,
        )
        self._queue = EventQueue()
        self._early = EarlyEvents()
        self._reporter = Reporter(channel, self._replica, transport, own_peer_id=self._own_peer_id)
        self._catch_up = CatchUp(self._replica, transport, own_peer_id=self._own_peer_id)
        self._catch_up.on_progress = self._reporter.sync_progress
        limit_mbit = config.upload_limit_mbit
        self._server = StateServer(self._replica, transport, upload_limit_mbit=limit_mbit)
        self._desk = ReductionDesk(transport)
        self._shell: RoundShell
        self._offers: Offers
        self._done_ratio = 0.0
        self._target_step = config.outer_step
        self._certificates: dict[int, rounds_pb2.Certificate] = {}
        self._checkpoint_path: str | None = None
        self._ahead = AheadClaims()
        self._next_settle_seconds = 0.0
        self._next_ask_checkpoint_seconds = 0.0
        self._saved_position = (-1, -1)
        self._next_save_seconds = time.monotonic() + config.checkpoint_interval_seconds
        self._tasks = BackgroundTasks(self._on_failure)
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # Life -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load what this home holds, then begin to answer members."""
        replica, config = self._replica, self._config
        stored = load_record(self._votes_folder)
        newest = config.incarnation_record
        content = replica.open_record(newest)
        assert content is not None, "the daemon checked the record's signature"
        if stored is not None:
            held = replica.open_record(stored)
            if held is not None and held.incarnation > content.incarnation:
                newest = stored
        self._shell = RoundShell(
            replica=replica,
            transport=self._transport,
            channel=self._channel,
            key=config.key,
            votes=self._enter_record(newest),
            desk=self._desk,
            post=self._queue.post,
            tasks=self._tasks,
        )
        self._offers = Offers(self._shell, replica, self._reporter, own_peer_id=self._own_peer_id)
        replica.learn_directive(config.directive)
        await asyncio.to_thread(self._load_local)
        if replica.is_current:  # others may have gone on meanwhile, and be idle now: ask them
            self._ahead.look_soon(0.0)
        self._update_members()
        await self._server.start()
        self._tasks.start(self._server.sweep(), name="sweep")
        await self._desk.start()
        await self._transport.serve_messages(ROUND_CALL, self._on_message, rounds_pb2.RoundMessage)
        self._tasks.start(tell_turns(self._channel), name="turns")
        presence = (self._dht, self._transport, self._replica, self._own_peer_id)
        self._tasks.start(keep_presence(*presence), name="presence")

    def _load_local(self) -> None:
        replica = self._replica
        replica.averages.load()
        for path in replica.store.paths():
            incarnation, _, _ = path.name.partition("-")
            if int(incarnation) > replica.incarnation:
                continue
            if replica.load_checkpoint_file(path):
                self._saved_position = replica.position
                return

    def _enter_record(self, signed: common_pb2.Signed) -> VoteFile:
        """Act on an incarnation record: store it before anything else, drop what is older."""
        save_record(self._votes_folder, signed)
        self._replica.enter_incarnation(signed)
        self._certificates.clear()
        self._next_settle_seconds = 0.0
        return VoteFile(self._votes_folder, incarnation=self._replica.incarnation)

    async def run(self) -> None:
        """Work until cancelled or the daemon is gone."""
        reader = asyncio.ensure_future(self._read_channel())
        reader.add_done_callback(lambda _: self._catch_up.stop.set())
        try:
            while not reader.done():
                await self._settle()
                await self._handle_next()
                await self._after_event()
            await reader
        except ChannelClosed:
            logger.debug("the daemon is gone")
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def close(self) -> None:
        """Leave in good order: save the state, stop what runs."""
        self._shell.end()
        await self._tasks.cancel_all()
        if self._replica.is_current and self._replica.position != self._saved_position:
            await self._save()
        self._shell.votes.close()
        self._server.close()

    async def wait_failed(self) -> None:
        """Wait for ever, or raise what a task beside `run` did not foresee."""
        await self._failed

    def _on_failure(self, error: BaseException) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)

    # What comes in ----------------------------------------------------------------------------

    async def _read_channel(self) -> None:
        """Pass the daemon's messages on; what must not wait is done here."""
        while True:
            message = await self._channel.receive()
            kind = message["kind"]
            if kind == "stop":
                return
            if kind == "progress":
                self._done_ratio = float(message["done_ratio"])
            elif kind == "coordinator_answer":
                self._shell.questions.answered(message)
            elif kind == "initial_peers":
                self._tasks.start(self._dht.add_peers(message["addresses"]))
            else:
                await self._queue.put(message)

    async def _on_message(
        self, peer_id: str, message: rounds_pb2.RoundMessage
    ) -> rounds_pb2.RoundAck:
        """A member's message: queued; the answer says how far we are."""
        self._shell.contacts.heard(peer_id, time.monotonic())
        replica, place = self._replica, (message.incarnation, message.outer_step)
        is_old = replica.is_current and place <= replica.position
        if not is_old:
            self._queue.post(place, rt.Received(peer_id, message))
        elif message.WhichOneof("body") != "certificate":
            self._send_old_certificate(peer_id, place)
        return rounds_pb2.RoundAck(
            incarnation=replica.incarnation,
            outer_step=replica.position[1] if replica.is_current else 0,
            done_ratio=self._done_ratio,
        )

    def _send_old_certificate(self, peer_id: str, place: Place) -> None:
        certificate = self._replica.certificate_by_step.get(place[1])
        if certificate is None or place[0] != self._replica.incarnation:
            return
        message = rounds_pb2.RoundMessage(
            incarnation=place[0], outer_step=place[1], certificate=certificate
        )
        self._tasks.start(self._shell.delivery.tell(peer_id, message))

    async def _handle_next(self) -> None:
        """One event, or a tick when nothing comes."""
        try:
            item = await asyncio.wait_for(self._queue.get(), TICK_SECONDS)
        except TimeoutError:
            await self._shell.handle(rt.Tick())
            return
        if isinstance(item, dict):
            await self._on_daemon(item)
            return
        place, event = item
        current = self._shell.place
        if current == place:
            await self._shell.handle(event)
        elif current is None or place > current:
            self._early.keep(place, event)
            is_ahead = current is not None or place > self._next_place()
            if isinstance(event, rt.Received) and is_ahead:
                self._ahead.heard(event.sender, time.monotonic())

    def _next_place(self) -> Place:
        incarnation, outer_step = self._replica.position
        return (incarnation, outer_step + 1)

    # Daemon -----------------------------------------------------------------------------------

    async def _on_daemon(self, message: Message) -> None:
        match message["kind"]:
            case "contribution":
                await self._offers.contribution(message)
            case "idle":
                await self._offers.idle(bool(message["is_idle"]))
            case "directive":
                await self._on_directive(common_pb2.Signed.FromString(message["directive"]))
            case "incarnation":
                self._on_record(common_pb2.Signed.FromString(message["record"]))
            case "certificates":
                await self._on_certificates(message["certificates"])
            case "certificates_acknowledged":
                self._replica.acknowledge(
                    incarnation=message["incarnation"], up_to_outer_step=message["up_to"]
                )
            case "write_checkpoint":
                await self._reporter.write_checkpoint(message)
            case "checkpoint_available":
                self._checkpoint_path = message["path"]
                self._next_settle_seconds = 0.0
            case "coordinator_state":
                pass
            case _:
                logger.warning("unknown message %r from the daemon", message["kind"])

    async def _on_directive(self, signed: common_pb2.Signed) -> None:
        if self._replica.learn_directive(signed) is not None:
            self._update_members()
            await self._shell.handle(rt.DirectiveKnown(signed))
            if self._reporter.has_state:
                self._tell_state()  # a pause acts by the newest directive, at receipt

    def _on_record(self, signed: common_pb2.Signed) -> None:
        record = self._replica.open_record(signed)
        if record is not None and record.incarnation > self._replica.incarnation:
            logger.info("incarnation %d: %s", record.incarnation, record.reason)
            self._shell.end()
            self._shell.votes.close()
            self._shell.votes = self._enter_record(signed)
            self._target_step = record.to_outer_step
            self._update_members()

    async def _on_certificates(self, serialised: list[bytes]) -> None:
        for data in serialised:
            certificate = rounds_pb2.Certificate.FromString(data)
            value = rounds_pb2.RoundValue.FromString(certificate.value)
            if value.incarnation == self._replica.incarnation:
                self._target_step = max(self._target_step, value.outer_step)
                if value.outer_step > self._replica.position[1]:
                    self._certificates[value.outer_step] = certificate
        following = self._certificates.get(self._replica.position[1] + 1)
        if following is not None:
            await self._shell.handle(rt.CertificateKnown(following))
            if self._shell.machine is None:
                self._next_settle_seconds = 0.0

    def _update_members(self) -> None:
        """Whom the transport answers: rosters of the directives newest, in force, last in force."""
        replica = self._replica
        directives = [replica.newest_directive(), *replica.recent_directives]
        p2p_by_peer: dict[str, str] = {}
        for signed in directives:
            for entry in common_pb2.Directive.FromString(signed.payload).roster:
                if entry.peer_id not in (self._own_peer_id, *p2p_by_peer):
                    p2p_by_peer[entry.peer_id] = entry.p2p_peer_id
                    self._transport.add_addresses(entry.peer_id, entry.addresses)
        self._transport.set_members(p2p_by_peer)
        self._tasks.start(self._transport.meet_members())

    # Settling ---------------------------------------------------------------------------------

    async def _settle(self) -> None:
        """Get to the newest incarnation and state, then begin the next round; cheap when all is
        well.
        """
        now = time.monotonic()
        if self._catch_up.newer_record is not None:
            self._on_record(self._catch_up.newer_record)
            self._catch_up.newer_record = None
        replica, shell = self._replica, self._shell
        is_due = now >= self._next_settle_seconds
        if not replica.is_current:
            if is_due:
                self._next_settle_seconds = now + _SETTLE_SECONDS
                await self._settle_base()
            return
        is_short = replica.position[1] < self._target_step
        if shell.machine is None and not is_short and self._begin_directive() is not None:
            await self._begin_round()
        elif is_due and (shell.machine is None or self._ahead.is_due(now)):
            self._next_settle_seconds = now + _SETTLE_SECONDS
            is_found = await self._go_forward(is_short=is_short)
            self._ahead.looked(time.monotonic(), is_found=is_found)

    def _begin_directive(self) -> common_pb2.Directive | None:
        """The directive in force, if this member is in its roster and somebody may vote."""
        directive = self._replica.directive_in_force()
        has_vote_by_peer = {entry.peer_id: entry.has_vote for entry in directive.roster}
        is_in = self._own_peer_id in has_vote_by_peer
        return directive if is_in and any(has_vote_by_peer.values()) else None

    async def _begin_round(self) -> None:
        directive = self._begin_directive()
        assert directive is not None
        self._update_members()
        await self._shell.begin(directive)
        reason = f"training for outer step {self._replica.position[1] + 1}"
        self._reporter.phase("IDLE", reason)
        if not self._reporter.has_state:
            self._tell_state()  # loaded from disk and still the newest: nothing else would tell it
        await self._offers.renew()
        place = self._shell.place
        for item in self._early.take(place) if place is not None else ():
            self._queue.post(*item)

    async def _settle_base(self) -> None:
        record = self._replica.record_content
        self._reporter.phase("SYNC", f"looking for the base of incarnation {record.incarnation}")
        if await self._catch_up.rebase() or await self._try_checkpoint():
            self._next_settle_seconds = 0.0  # the swarm may be ahead of it
            await self._publish_new_state("a new incarnation has begun")
        elif self._catch_up.newer_record is None:
            self._ask_checkpoint(record.to_outer_step)

    async def _go_forward(self, *, is_short: bool) -> bool:
        """Ask members, use certificates and checkpoints, until there is nothing newer; True if
        there was something.
        """
        replica = self._replica
        before = (replica.position, replica.state_digest)
        if is_short:
            reason = f"outer step {self._target_step} is certified, we hold {replica.position[1]}"
            self._reporter.phase("SYNC", reason)
        await self._catch_up.forward()
        await self._use_certificates()
        if self._catch_up.problem:
            self._reporter.phase("SYNC", self._catch_up.problem)
        if replica.position[1] < self._target_step and not await self._try_checkpoint():
            self._ask_checkpoint(self._target_step)
        is_found = (replica.position, replica.state_digest) != before
        if is_found:
            self._shell.end()
            await self._publish_new_state("caught up with the swarm")
        elif self._shell.machine is None and not is_short:
            self._reporter.phase("IDLE", "not in the roster in force yet")
            if not self._reporter.has_state:
                self._tell_state()  # loaded from disk, still the newest: nothing else tells it
        return is_found or self._catch_up.newer_record is not None

    async def _use_certificates(self) -> None:
        replica = self._replica
        newest = common_pb2.Directive.FromString(replica.newest_directive().payload)
        holders = [entry.peer_id for entry in newest.roster]
        while (c := self._certificates.pop(replica.position[1] + 1, None)) is not None:
            if not await self._catch_up.apply_next(c, holders):
                self._certificates[replica.position[1] + 1] = c
                return

    async def _try_checkpoint(self) -> bool:
        path, self._checkpoint_path = self._checkpoint_path, None
        return path is not None and await self._catch_up.take_checkpoint(path)

    def _ask_checkpoint(self, outer_step: int) -> None:
        now = time.monotonic()
        if now >= self._next_ask_checkpoint_seconds:
            self._next_ask_checkpoint_seconds = now + _ASK_CHECKPOINT_SECONDS
            self._channel.send("need_checkpoint", max_outer_step=outer_step)

    async def _publish_new_state(self, reason: str) -> None:
        """The state was replaced: whatever was trained on another one is lost."""
        was_known = self._reporter.has_state
        self._after_state()
        if was_known:
            self._offers.lost(reason)

    def _after_state(self) -> None:
        self._done_ratio = 0.0
        self._update_members()
        self._tell_state()

    def _tell_state(self) -> None:
        self._reporter.state(is_newest=self._replica.position[1] >= self._target_step)

    # After an event ---------------------------------------------------------------------------

    async def _after_event(self) -> None:
        shell = self._shell
        if shell.refused_reason:
            reason, shell.refused_reason = shell.refused_reason, ""
            self._offers.lost(reason)
        if shell.behind is not None:
            self._ahead.heard(shell.behind.peer_id, time.monotonic())
            shell.behind = None
        if shell.committed is not None:
            commit, shell.committed = shell.committed, None
            await self._apply(commit)
        if time.monotonic() >= self._next_save_seconds and self._replica.is_current:
            if self._replica.position != self._saved_position:
                await self._save()
            interval = self._config.checkpoint_interval_seconds
            self._next_save_seconds = time.monotonic() + interval

    async def _apply(self, commit: rt.Commit) -> None:
        """Make the decided step, or leave it to catching up if its bytes are not here."""
        shell = self._shell
        is_in = shell.has_work and commit.is_own_included
        self._reporter.phase("APPLY", f"certified in attempt {commit.attempt}")
        value = rounds_pb2.RoundValue.FromString(commit.certificate.value)
        self._target_step = max(self._target_step, value.outer_step)
        if commit.next_directive is not None:
            self._replica.learn_directive(commit.next_directive)
        await shell.finish_reduction()
        is_applied = await self._catch_up.apply_certificate(commit.certificate, commit.holders)
        reason = f"certified in attempt {commit.attempt} by {len(commit.certificate.votes)} votes"
        outcome = AttemptOutcome.COMMITTED if is_applied else AttemptOutcome.SUPERSEDED
        shell.end_attempt(outcome, attempt=commit.attempt, reason=reason)
        shell.end()
        if not is_applied:
            self._certificates[value.outer_step] = commit.certificate
            self._next_settle_seconds = 0.0
            return
        self._ahead.clear()
        self._after_state()
        self._reporter.outcome(
            RoundOutcome.COMMITTED if is_in else RoundOutcome.RESYNC,
            reason=reason if is_in else f"{reason} without our contribution",
            offer_number=self._offers.take_number(),
            certificate=commit.certificate,
            seconds_by_phase=shell.seconds_by_phase,
        )

    async def _save(self) -> None:
        await asyncio.to_thread(self._replica.save_local)
        self._saved_position = self._replica.position
