"""Numbers and sentences about a session, for its owner, for heartbeats and for /metrics.

A Report is what the daemon tells its reporter (the command line prints it); SessionNumbers are the
running sums, filled from the children's messages. Nothing here decides anything.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peer.home import load_status, write_atomically
from peer.swarm.timeline import AttemptTimeline
from protos.contract.telemetry import (
    ATTEMPT_PHASES,
    AttemptOutcome,
    RoundPhase,
    SessionState,
)
from protos.muster.v1 import membership_pb2

_LINK_FADING = 0.9
"""What is left of the best link speed after a round that did not reach it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One thing to tell the owner."""

    kind: str
    """state, progress, round, note or warning."""
    text: str
    fields: dict[str, Any] = field(default_factory=dict)


Reporter = Callable[[Report], None]


@dataclass(slots=True, kw_only=True)
class SessionNumbers:
    """Running sums of one daemon."""

    peer_id: str
    name: str
    run_id: str = ""
    address: str = ""
    state: str = SessionState.IDLE.value
    state_reason: str = ""
    incarnation: int = 0
    outer_step: int = 0
    schedule_tokens: int = 0
    round_tokens: int = 0
    loss_nats: float = 0.0
    tokens_per_second: float = 0.0
    trained_tokens: int = 0
    earlier_trained_tokens: int = 0
    """Trained by trainers that have ended; a new one counts from 0."""
    committed_tokens: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    num_rounds_committed: int = 0
    num_attempts_discarded: int = 0
    round_seconds: float = 0.0
    upload_bytes_per_second: float = 0.0
    download_bytes_per_second: float = 0.0
    """Best of recent rounds while averaging: the link is at least as fast."""
    attempts: list[AttemptTimeline] = field(default_factory=list)
    """The newest few, oldest first."""
    bytes_by_peer: dict[str, tuple[int, int]] = field(default_factory=dict)
    """peer_id -> (sent, received) bytes in all attempts."""
    links: dict[str, dict[str, Any]] = field(default_factory=dict)
    """peer_id -> how bytes to that member travel, and how fast they did in the last committed
    attempt: fields of PairWay, sent_ and received_bytes_per_second.
    """
    discard_reason: str = ""
    """Of the last attempt that was discarded."""
    held_leases: int = 0
    held_tokens: int = 0
    unreported_certificates: int = 0
    clock_offset_seconds: float = 0.0
    memory_bytes: int = 0
    is_coordinator_reachable: bool = True
    metrics_port: int | None = None
    device: str = ""
    step_plan: str = ""
    """How micro-batches are run, and why."""
    micro_batch_sequences: int = 0
    addresses: list[str] = field(default_factory=list)
    is_dialled: bool = True
    """False if the coordinator found that nobody can connect to this peer."""

    @property
    def last_committed(self) -> AttemptTimeline | None:
        """Newest attempt that was committed, if it is among the newest few."""
        found = [a for a in self.attempts if a.outcome is AttemptOutcome.COMMITTED]
        return found[-1] if found else None

    def claims(self) -> membership_pb2.PeerClaims:
        """What a heartbeat says of this peer."""
        committed = self.last_committed
        seconds = {} if committed is None else committed.seconds_by_phase()
        speed = 0.0 if committed is None else committed.averaging_bytes_per_second
        return membership_pb2.PeerClaims(
            **{f"{p.value.lower()}_seconds": seconds.get(p.value.lower()) for p in ATTEMPT_PHASES},
            averaging_bytes_per_second=speed,
            discard_reason=self.discard_reason[:500],
            state=self.state,
            state_reason=self.state_reason[:500],
            outer_step=self.outer_step,
            loss_nats=self.loss_nats,
            tokens_per_second=self.tokens_per_second,
            sent_bytes=self.sent_bytes,
            received_bytes=self.received_bytes,
            num_rounds_committed=self.num_rounds_committed,
            num_attempts_discarded=self.num_attempts_discarded,
            round_seconds=self.round_seconds,
            clock_offset_seconds=self.clock_offset_seconds,
            memory_bytes=self.memory_bytes,
            trained_tokens=self.trained_tokens,
            upload_bytes_per_second=self.upload_bytes_per_second,
            download_bytes_per_second=self.download_bytes_per_second,
        )

    def note_links(self, timeline: AttemptTimeline) -> None:
        """Take the speeds of a round's averaging; an old best fades by a tenth per round."""
        spans = [s for s in timeline.spans if s.phase in (RoundPhase.EXCHANGE, RoundPhase.REDUCE)]
        seconds = sum(span.seconds for span in spans)
        if seconds <= 0:
            return
        sent = sum(span.sent_bytes for span in spans) / seconds
        received = sum(span.received_bytes for span in spans) / seconds
        kept = _LINK_FADING
        self.upload_bytes_per_second = max(sent, kept * self.upload_bytes_per_second)
        self.download_bytes_per_second = max(received, kept * self.download_bytes_per_second)

    def progress_text(self) -> str:
        """One line of progress."""
        loss = f"{self.loss_nats:.3f}" if self.loss_nats else "-"
        return (
            f"step {self.outer_step}  loss {loss}  {self.tokens_per_second:,.0f} tokens/s  "
            f"trained {self.trained_tokens:,}  committed {self.committed_tokens:,}  "
            f"leases {self.held_leases} ({self.held_tokens:,} tokens)"
        )

    def save(self, path: Path) -> None:
        """Write status.json for `muster-peer status`."""
        plain = asdict(self) | {"pid": os.getpid(), "update_unix_seconds": time.time()}
        write_atomically(path, json.dumps(plain).encode(), is_durable=False)


def read_status(home: Path) -> dict[str, Any] | None:
    """`load_status`, with defaults for what a peer of an older package does not write: the package
    may be upgraded under it.
    """
    found = load_status(home)
    if found is None:
        return None
    whole = asdict(SessionNumbers(peer_id="", name="")) | {"update_unix_seconds": 0.0} | found
    return whole | {"attempts": [{"ways": {}} | attempt for attempt in whole["attempts"]]}
