"""What the swarm process tells the daemon: state, certificates, outcomes, phases, checkpoints."""

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

from peer.checkpoint.store import save_checkpoint
from peer.ipc import AsyncChannel, Message
from peer.swarm.replica import Replica
from peer.swarm.transport import Transport
from protos.contract.errors import MachineError
from protos.contract.telemetry import RoundOutcome
from protos.muster.v1 import common_pb2, rounds_pb2

logger = logging.getLogger(__name__)

_MAX_CERTIFICATES = 64
"""Unreported certificates repeated in one message; the rest follows when these are acknowledged."""


class Reporter:
    """Sends reports in the order that the daemon relies on."""

    def __init__(
        self, channel: AsyncChannel, replica: Replica, transport: Transport, *, own_peer_id: str
    ) -> None:
        self._channel, self._replica, self._transport = channel, replica, transport
        self._own_peer_id = own_peer_id
        self._wire_bytes = (0, 0)
        self._phase = ("", "")
        self.has_state = False
        self._next_progress_seconds = 0.0

    def phase(self, phase: str, reason: str) -> None:
        """Tell the phase when it or its reason changes."""
        if (phase, reason) != self._phase:
            self._phase = (phase, reason)
            self._channel.send("phase", phase=phase, reason=reason)

    def sync_progress(self, text: str) -> None:
        """Tell how far the download of a state is, at most once a second."""
        now = time.monotonic()
        if now >= self._next_progress_seconds:
            self._next_progress_seconds = now + 1.0
            self.phase("SYNC", text)

    def state(self, *, is_newest: bool) -> None:
        """Tell which state is held now, then which certificates the coordinator lacks."""
        replica, meta = self._replica, self._replica.meta
        assert meta is not None
        self.has_state = True
        in_force = replica.directive_in_force()
        newest = common_pb2.Directive.FromString(replica.newest_directive().payload)
        self._channel.send(
            "state",
            incarnation=meta.incarnation,
            outer_step=meta.outer_step,
            schedule_tokens=meta.schedule_tokens,
            directive_number=meta.directive_number,
            state_digest=replica.state_digest,
            attestation=replica.attestation.SerializeToString(),
            round_tokens=self._own_tokens(in_force) if is_newest else 0,
            coming_tokens=self._own_tokens(newest) if is_newest else 0,
            is_paused=newest.is_paused,
        )
        if replica.unreported:
            first = self._most_wanted(replica.unreported)
            self._channel.send("certificates", certificates=[c.SerializeToString() for c in first])

    def _own_tokens(self, directive: common_pb2.Directive) -> int:
        """What this peer trains under a directive; nobody does without a voter."""
        if not any(entry.has_vote for entry in directive.roster):
            return 0
        entries = (e.round_tokens for e in directive.roster if e.peer_id == self._own_peer_id)
        return int(next(entries, 0))

    def _most_wanted(
        self, certificates: list[rounds_pb2.Certificate]
    ) -> list[rounds_pb2.Certificate]:
        """Those of this incarnation first: older ones may never be acknowledged."""

        def is_older(certificate: rounds_pb2.Certificate) -> bool:
            value = rounds_pb2.RoundValue.FromString(certificate.value)
            return bool(value.incarnation != self._replica.incarnation)

        return sorted(certificates, key=is_older)[:_MAX_CERTIFICATES]

    def outcome(
        self,
        outcome: RoundOutcome,
        *,
        reason: str,
        offer_number: int,
        certificate: rounds_pb2.Certificate | None = None,
        seconds_by_phase: dict[str, float] | None = None,
    ) -> None:
        """Tell what became of the trainer's work; it reads the state again afterwards.

        `offer_number` names the contribution that this is the verdict on, 0 if it is about none:
        then the work under way alone may be lost, if it was made on another state.
        """
        self._replica.feedback.end_round(
            is_committed=outcome is RoundOutcome.COMMITTED, place=self._replica.position
        )
        sent, received = self._transport.sent_bytes, self._transport.received_bytes
        num_peers = 0
        if certificate is not None:
            held = rounds_pb2.Contributions.FromString(certificate.contributions)
            num_peers = len(held.contributions)
        incarnation, outer_step = self._replica.position
        self._channel.send(
            "round_outcome",
            outcome=outcome.value,
            incarnation=incarnation,
            outer_step=outer_step,
            reason=reason,
            offer_number=offer_number,
            num_peers=num_peers,
            wire_sent_bytes=sent - self._wire_bytes[0],
            wire_received_bytes=received - self._wire_bytes[1],
            seconds_by_phase=seconds_by_phase or {},
            attempt=certificate.attempt if certificate is not None else 0,
        )
        self._wire_bytes = (sent, received)

    async def write_checkpoint(self, message: Message) -> None:
        """Write the current state where the daemon wants it; a failure is told as an empty path."""
        replica, path = self._replica, Path(message["path"])
        answer: dict[str, Any] = {"request_id": message["request_id"], "path": ""}
        if replica.is_current and replica.meta is not None:
            header = replica.checkpoint_header()
            try:
                await asyncio.to_thread(
                    save_checkpoint, path, header, replica.vectors.state_vectors()
                )
                answer["path"] = str(path)
            except MachineError as error:
                logger.warning("checkpoint was not written: %s", error)
            answer["incarnation"], answer["outer_step"] = replica.position
            answer["state_digest"] = replica.state_digest
            answer["attestation"] = replica.attestation.SerializeToString()
        self._channel.send("checkpoint_written", **answer)
