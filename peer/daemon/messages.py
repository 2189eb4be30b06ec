"""Messages of the children: numbers are noted, bytes are passed on, what decisions need becomes an
event.

The daemon is the hub, so swarm process and trainer know nothing of each other. A message that lacks
a field or names a kind that there is not is a bug of ours and ends the daemon with a traceback;
children are no strangers.
"""

import logging
from collections.abc import Callable, Mapping

from peer import session_events as ev
from peer.daemon.child_watch import ChildWatch
from peer.daemon.children import ChildFailure
from peer.daemon.coordinator_tasks import CoordinatorTasks
from peer.daemon.core import Core
from peer.daemon.duties import Duties
from peer.daemon.outbox import Outbox
from peer.daemon.reports import Report
from peer.daemon.timelines import note_discarded, take_attempt
from peer.ipc import Message
from peer.lease_holdings import UsedRange
from peer.session_events import ChildName
from peer.swarm.timeline import AttemptTimeline
from protos.contract import telemetry
from protos.contract.telemetry import LogField, RoundOutcome, RoundPhase
from protos.muster.v1 import common_pb2

_LOGGER = logging.getLogger(__name__)
Send = Callable[..., bool]
_FOR_TASKS = frozenset({"coordinator_request", "need_checkpoint"})


class MessageDesk:
    """Takes in what both children say."""

    def __init__(
        self,
        core: Core,
        *,
        outbox: Outbox,
        coordinator: CoordinatorTasks,
        duties: Duties,
        send: Send,
        start_task: Callable[[Message], None],
        note_failure: Callable[[ChildName, ChildFailure], None],
        watches: Mapping[ChildName, ChildWatch],
    ) -> None:
        """`start_task` serves messages that need a call to the coordinator."""
        self._core = core
        self._outbox = outbox
        self._coordinator = coordinator
        self._duties = duties
        self._send = send
        self._start_task = start_task
        self._note_failure = note_failure
        self._watches = watches
        self._offered: Message = {}
        self._contribution: Message = {}
        """In the round under way."""

    def take(self, child: ChildName, message: Message) -> None:
        """Take in one message."""
        if message["kind"] == "failed":
            failure = ChildFailure(
                reason=message["reason"],
                exit_code=message.get("exit_code"),
                is_out_of_memory=message.get("is_out_of_memory", False),
                lost_devices=tuple(message.get("lost_devices", ())),
            )
            self._note_failure(child, failure)
        elif message["kind"] == "turn":
            self._watches[child].turn(message["longest_turn_seconds"])
        elif child is ChildName.SWARM:
            self._take_from_swarm(message)
        else:
            self._take_from_trainer(message)

    def pass_contribution(self) -> None:
        """Give the swarm process what the trainer has offered."""
        self._contribution = self._offered
        fields = {key: value for key, value in self._offered.items() if key != "kind"}
        self._send(ChildName.SWARM, "contribution", **fields)

    # Swarm process.

    def _take_from_swarm(self, message: Message) -> None:
        core = self._core
        match message["kind"]:
            case "ready":
                core.numbers.addresses = list(message["addresses"])
                core.feed(ev.ChildReady(child=ChildName.SWARM))
            case "state":
                self._take_state(message)
            case "phase":
                core.feed(
                    ev.PhaseChanged(phase=RoundPhase(message["phase"]), reason=message["reason"])
                )
            case "round_outcome":
                self._take_outcome(message)
            case "certificates":
                self._coordinator.add_certificates(message["certificates"])
            case "checkpoint_written":
                self._duties.take_answer(message["request_id"], message)
            case "attempt_discarded":
                note_discarded(
                    core,
                    outer_step=message["outer_step"],
                    attempt=message["attempt"],
                    reason=message["reason"],
                )
            case "attempt_timeline":
                timeline = AttemptTimeline.from_plain(message)
                core.numbers.note_links(timeline)
                take_attempt(core, timeline)
            case kind if kind in _FOR_TASKS:
                self._start_task(message)
            case kind:
                raise AssertionError(f"the swarm process sent {kind!r}")

    def _take_state(self, message: Message) -> None:
        core, numbers = self._core, self._core.numbers
        incarnation, outer_step = message["incarnation"], message["outer_step"]
        if incarnation != numbers.incarnation:
            self._coordinator.lease_by_number.clear()
        numbers.incarnation, numbers.outer_step = incarnation, outer_step
        numbers.schedule_tokens = message["schedule_tokens"]
        numbers.round_tokens = message["round_tokens"]
        self._duties.note_state(
            incarnation=incarnation, outer_step=outer_step, state_digest=message["state_digest"]
        )
        if message["attestation"]:
            self._outbox.add_attestation(message["attestation"])
        core.metrics.set(telemetry.PEER_OUTER_STEP, outer_step)
        core.metrics.set(telemetry.PEER_INCARNATION, incarnation)
        _LOGGER.info(
            "%s=%d %s=%d %s=%s",
            LogField.INCARNATION,
            incarnation,
            LogField.OUTER_STEP,
            outer_step,
            LogField.DIGEST,
            message["state_digest"].hex()[:16],
        )
        core.feed(
            ev.StateReached(
                incarnation=incarnation,
                outer_step=outer_step,
                state_digest=message["state_digest"],
                round_tokens=message["round_tokens"],
                is_paused=message["is_paused"],
                coming_tokens=message["coming_tokens"],
            )
        )

    def _take_outcome(self, message: Message) -> None:
        core, numbers, metrics = self._core, self._core.numbers, self._core.metrics
        outcome = RoundOutcome(message["outcome"])
        seconds_by_phase: dict[str, float] = message.get("seconds_by_phase") or {}
        sent, received = message["wire_sent_bytes"], message["wire_received_bytes"]
        numbers.sent_bytes += sent
        numbers.received_bytes += received
        metrics.add(telemetry.PEER_ROUND_WIRE_BYTES, sent, {"direction": "sent"})
        metrics.add(telemetry.PEER_ROUND_WIRE_BYTES, received, {"direction": "received"})
        is_ours = self._contribution.get("offer_number") == message["offer_number"]
        if outcome is RoundOutcome.COMMITTED:
            numbers.num_rounds_committed += 1
            numbers.round_seconds = sum(seconds_by_phase.values())
            if is_ours:
                tokens = self._contribution["num_tokens"]
                numbers.committed_tokens += tokens
                self._note_trained(numbers.committed_tokens)  # progress is limited in rate
                metrics.add(telemetry.PEER_COMMITTED_TOKENS, tokens)
            metrics.set(telemetry.PEER_ROUND_PEERS, message["num_peers"])
        if is_ours:
            self._contribution = {}
        core.report(
            Report(
                kind="round",
                text=f"step {message['outer_step']}: {outcome.value} {message['reason']}".rstrip(),
                fields={key: value for key, value in message.items() if key != "kind"},
            )
        )
        core.feed(
            ev.RoundEnded(
                outcome=outcome,
                incarnation=message["incarnation"],
                outer_step=message["outer_step"],
                reason=message["reason"],
                offer_number=message["offer_number"],
            )
        )

    # Trainer.

    def _take_from_trainer(self, message: Message) -> None:
        core = self._core
        match message["kind"]:
            case "ready":
                core.numbers.device = message["device"]
                core.numbers.step_plan = message["reason"]
                core.numbers.micro_batch_sequences = sequences = message["micro_batch_sequences"]
                if message["num_ranks"] > 1:
                    core.note(f"layout: {message['reason']}")
                core.feed(
                    ev.ChildReady(
                        child=ChildName.TRAINER,
                        micro_batch_sequences=sequences,
                        can_save_memory=message["can_save_memory"],
                    )
                )
            case "progress":
                self._take_progress(message)
            case "bad_batch":
                core.metrics.add(telemetry.PEER_BAD_BATCHES, 1)
                _LOGGER.warning("micro-batch skipped: %(reason)s; kept %(kept)s", message)
            case "layer_stats":
                self._show_layers(message["layers"])
            case "need_leases":
                core.feed(ev.LeasesNeeded())
            case "contribution_ready":
                self._offered = message
                core.feed(
                    ev.ContributionReady(
                        offer_number=message["offer_number"],
                        incarnation=message["incarnation"],
                        outer_step=message["outer_step"],
                        ranges=tuple(_used_range(entry) for entry in message["ranges"]),
                    )
                )
            case "released":
                core.feed(
                    ev.LeasesReleasedByTrainer(
                        lease_numbers=tuple(message["lease_numbers"]), reason=message["reason"]
                    )
                )
            case "idle":
                core.feed(ev.TrainerIdle(is_idle=message["is_idle"]))
            case "evaluation":
                self._duties.take_answer(message["duty_id"], message)
            case kind:
                raise AssertionError(f"the trainer sent {kind!r}")

    def _take_progress(self, message: Message) -> None:
        core, numbers = self._core, self._core.numbers
        self._note_trained(numbers.earlier_trained_tokens + message["trained_tokens"])
        numbers.loss_nats = message["loss_nats"]
        numbers.tokens_per_second = message["tokens_per_second"]
        core.metrics.set(telemetry.PEER_LOSS_NATS, numbers.loss_nats)
        core.metrics.set(telemetry.PEER_TOKENS_PER_SECOND, numbers.tokens_per_second)
        if numbers.round_tokens:
            done_ratio = min(1.0, message["num_tokens"] / numbers.round_tokens)
            self._send(ChildName.SWARM, "progress", done_ratio=done_ratio)
        core.feed(ev.TrainingProgressed(contribution_tokens=message["num_tokens"]))

    def _show_layers(self, layers: list[Message]) -> None:
        """Activations and gradients of the layers, as the owner asked for them."""
        for layer in layers:
            for metric, kind in (
                (telemetry.PEER_LAYER_ACTIVATION, "activation"),
                (telemetry.PEER_LAYER_GRADIENT, "gradient"),
            ):
                for statistic in ("rms", "max"):
                    self._core.metrics.set(
                        metric,
                        layer[f"{kind}_{statistic}"],
                        {"layer": layer["layer"], "statistic": statistic},
                    )

    def _note_trained(self, trained_tokens: int) -> None:
        numbers = self._core.numbers
        if trained_tokens > numbers.trained_tokens:
            more_tokens = trained_tokens - numbers.trained_tokens
            self._core.metrics.add(telemetry.PEER_TRAINED_TOKENS, more_tokens)
            numbers.trained_tokens = trained_tokens


def _used_range(entry: Message) -> UsedRange:
    signed = common_pb2.Signed.FromString(entry["lease"])
    lease = common_pb2.Lease.FromString(signed.payload)
    return UsedRange(
        lease_number=lease.lease_number,
        begin_window=entry["begin_window"],
        end_window=entry["end_window"],
    )
