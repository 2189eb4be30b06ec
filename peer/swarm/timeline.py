"""What happened when, and how many bytes moved, in one attempt: for metrics, log and status.

Phases follow one another: FORM (own contribution ready, waiting for the group), EXCHANGE (own
pieces go out, the others' come in and are summed), REDUCE (the averaged pieces come back), AGREE
(votes), APPLY (exact update). The recorder is told the time and the traffic counters, so it needs
no clock.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from protos.contract.telemetry import AttemptOutcome, RoundPhase

BytesByPeer = Mapping[str, tuple[int, int]]
"""peer_id -> (sent, received) bytes."""

_NOTHING = (0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSpan:
    """One phase of an attempt."""

    phase: RoundPhase
    begin_unix_seconds: float
    end_unix_seconds: float
    sent_bytes: int
    received_bytes: int

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.end_unix_seconds - self.begin_unix_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class PairWay:
    """How the parts that this member sends another one travel."""

    num_lanes: int
    """Connections beside libp2p's; 0: over its one stream."""
    rtt_seconds: float
    """Of the quickest call so far; 0 before there was one."""
    reason: str
    """Why a far member has no lanes; "" if it has, or is near."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptTimeline:
    """One attempt from its begin to its end, as this member saw it."""

    incarnation: int
    outer_step: int
    attempt: int
    outcome: AttemptOutcome
    reason: str
    spans: tuple[PhaseSpan, ...]
    """In order of time; a phase that was not reached is missing."""
    bytes_by_peer: dict[str, tuple[int, int]]
    """peer_id -> (sent, received) bytes in this attempt."""
    ways: dict[str, PairWay]
    """peer_id -> how bytes travelled at its end."""

    @property
    def sent_bytes(self) -> int:
        """Bytes sent to all peers."""
        return sum(span.sent_bytes for span in self.spans)

    @property
    def received_bytes(self) -> int:
        """Bytes received from all peers."""
        return sum(span.received_bytes for span in self.spans)

    @property
    def averaging_bytes_per_second(self) -> float:
        """Bytes in and out per second of EXCHANGE and REDUCE; 0 before them."""
        spans, seconds = self._averaging_spans()
        moved = sum(span.sent_bytes + span.received_bytes for span in spans)
        return moved / seconds if seconds > 0 else 0.0

    def speed_by_peer(self) -> dict[str, tuple[float, float]]:
        """peer_id -> (sent, received) bytes of the attempt per second of EXCHANGE and REDUCE."""
        _, seconds = self._averaging_spans()
        return {
            peer: (sent / seconds, received / seconds) if seconds > 0 else (0.0, 0.0)
            for peer, (sent, received) in self.bytes_by_peer.items()
        }

    def _averaging_spans(self) -> tuple[list[PhaseSpan], float]:
        spans = [s for s in self.spans if s.phase in (RoundPhase.EXCHANGE, RoundPhase.REDUCE)]
        return spans, sum(span.seconds for span in spans)

    def seconds_by_phase(self) -> dict[str, float]:
        """Durations by the phase's name in lower case."""
        seconds: dict[str, float] = {}
        for span in self.spans:
            name = span.phase.value.lower()
            seconds[name] = round(seconds.get(name, 0.0) + span.seconds, 6)
        return seconds

    def to_plain(self) -> dict[str, Any]:
        """Plain data, for the channel to the daemon."""
        return asdict(self) | {
            "spans": [asdict(span) for span in self.spans],
            "bytes_by_peer": {peer: list(moved) for peer, moved in self.bytes_by_peer.items()},
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """Inverse of `to_plain`; other keys are ignored."""
        spans = [PhaseSpan(**{**s, "phase": RoundPhase(s["phase"])}) for s in plain["spans"]]
        return cls(
            incarnation=plain["incarnation"],
            outer_step=plain["outer_step"],
            attempt=plain["attempt"],
            outcome=AttemptOutcome(plain["outcome"]),
            reason=plain["reason"],
            spans=tuple(spans),
            bytes_by_peer={peer: (m[0], m[1]) for peer, m in plain["bytes_by_peer"].items()},
            ways={peer: PairWay(**way) for peer, way in plain["ways"].items()},
        )


class TimelineRecorder:
    """Books the phases of one outer step's attempts, one after the other."""

    def __init__(self, *, incarnation: int, outer_step: int) -> None:
        self._incarnation, self._outer_step = incarnation, outer_step
        self._phase: RoundPhase | None = None
        self._since_seconds = 0.0
        self._moved_since: dict[str, tuple[int, int]] = {}
        self._moved_at_begin: dict[str, tuple[int, int]] = {}
        self._spans: list[PhaseSpan] = []

    @property
    def phase(self) -> RoundPhase | None:
        """Phase under way; None between attempts."""
        return self._phase

    def enter(self, phase: RoundPhase, *, now_unix_seconds: float, moved: BytesByPeer) -> None:
        """A phase begins and ends the one before; `moved` are the counters since the start."""
        if self._phase is None:
            self._moved_at_begin = dict(moved)
        self._close(now_unix_seconds, moved)
        self._phase, self._since_seconds, self._moved_since = phase, now_unix_seconds, dict(moved)

    def end(
        self,
        outcome: AttemptOutcome,
        *,
        attempt: int,
        reason: str,
        now_unix_seconds: float,
        moved: BytesByPeer,
        ways: Mapping[str, PairWay],
    ) -> AttemptTimeline:
        """The attempt is over; the next phase entered begins another."""
        self._close(now_unix_seconds, moved)
        by_peer = _moved_between(self._moved_at_begin, moved) if self._spans else {}
        timeline = AttemptTimeline(
            incarnation=self._incarnation,
            outer_step=self._outer_step,
            attempt=attempt,
            outcome=outcome,
            reason=reason,
            spans=tuple(self._spans),
            bytes_by_peer=by_peer,
            ways={peer: way for peer, way in ways.items() if peer in by_peer},
        )
        self._phase, self._spans = None, []
        return timeline

    def _close(self, now_unix_seconds: float, moved: BytesByPeer) -> None:
        if self._phase is None:
            return
        between = _moved_between(self._moved_since, moved).values()
        self._spans.append(
            PhaseSpan(
                phase=self._phase,
                begin_unix_seconds=self._since_seconds,
                end_unix_seconds=max(now_unix_seconds, self._since_seconds),
                sent_bytes=sum(sent for sent, _ in between),
                received_bytes=sum(received for _, received in between),
            )
        )


def _moved_between(before: BytesByPeer, after: BytesByPeer) -> dict[str, tuple[int, int]]:
    found = {}
    for peer_id, (sent, received) in after.items():
        sent_before, received_before = before.get(peer_id, _NOTHING)
        moved = (sent - sent_before, received - received_before)
        if moved != _NOTHING:
            found[peer_id] = moved
    return found
