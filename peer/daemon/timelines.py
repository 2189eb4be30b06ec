"""What the daemon makes of an attempt's timeline: metrics, one log line, the newest few for
`status`.

Histograms hold committed attempts only; the time of discarded ones is a counter of its own, and
their reason is told to the owner.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from peer.daemon.core import Core
from peer.daemon.reports import Report
from peer.swarm.timeline import AttemptTimeline
from protos.contract import telemetry
from protos.contract.telemetry import MAX_LABELLED_PEERS, AttemptOutcome, LogField
from protos.contract.text import counted

_LOGGER = logging.getLogger(__name__)
NUM_KEPT_ATTEMPTS = 8
_OTHER_PEERS = "other"


def note_discarded(core: Core, *, outer_step: int, attempt: int, reason: str) -> None:
    """An attempt was discarded; one that had not begun here has no timeline."""
    core.numbers.num_attempts_discarded += 1
    core.numbers.discard_reason = f"step {outer_step} attempt {attempt}: {reason}"
    core.metrics.add(telemetry.PEER_ATTEMPTS, 1, {"outcome": AttemptOutcome.DISCARDED.value})
    _LOGGER.info("attempt %d of step %d discarded: %s", attempt, outer_step, reason)


def take_attempt(core: Core, attempt: AttemptTimeline) -> None:
    """Take in the timeline of an attempt that has ended."""
    numbers, metrics = core.numbers, core.metrics
    numbers.attempts = [*numbers.attempts, attempt][-NUM_KEPT_ATTEMPTS:]
    seconds_by_phase = attempt.seconds_by_phase()
    if attempt.outcome is AttemptOutcome.COMMITTED:
        metrics.add(telemetry.PEER_ATTEMPTS, 1, {"outcome": attempt.outcome.value})
        for phase, seconds in seconds_by_phase.items():
            metrics.observe(telemetry.PEER_ROUND_PHASE_SECONDS, seconds, {"phase": phase})
        speed = attempt.averaging_bytes_per_second
        metrics.set(telemetry.PEER_AVERAGING_BYTES_PER_SECOND, speed)
        _show_links(core, attempt)
    else:
        metrics.add(telemetry.PEER_DISCARDED_SECONDS, sum(seconds_by_phase.values()))
    for peer_id, moved in attempt.bytes_by_peer.items():
        _count_bytes(core, peer_id, *moved)
    text = describe_attempt(attempt)
    place = {"incarnation": attempt.incarnation, "outer_step": attempt.outer_step}
    fields = {**place, "seconds_by_phase": seconds_by_phase, "bytes_by_peer": attempt.bytes_by_peer}
    core.report(
        Report(kind="attempt", text=text, fields=fields | {"outcome": attempt.outcome.value})
    )
    _LOGGER.debug("%s=%d %s", LogField.INCARNATION, attempt.incarnation, text)


def _show_links(core: Core, attempt: AttemptTimeline) -> None:
    speeds, links = attempt.speed_by_peer(), core.numbers.links
    for peer_id, way in attempt.ways.items():
        if peer_id not in links and len(links) >= MAX_LABELLED_PEERS:
            continue
        sent, received = speeds[peer_id]
        links[peer_id] = asdict(way) | {
            "sent_bytes_per_second": sent,
            "received_bytes_per_second": received,
        }
        core.metrics.set(telemetry.PEER_LINK_LANES, way.num_lanes, {"peer": peer_id})
        core.metrics.set(telemetry.PEER_LINK_RTT_SECONDS, way.rtt_seconds, {"peer": peer_id})
        for direction, speed in (("sent", sent), ("received", received)):
            labels = {"peer": peer_id, "direction": direction}
            core.metrics.set(telemetry.PEER_LINK_BYTES_PER_SECOND, speed, labels)


def describe_link(link: Mapping[str, Any]) -> str:
    """One link of SessionNumbers in words."""
    lanes, rtt_ms = link["num_lanes"], link["rtt_seconds"] * 1e3
    way = counted(lanes, "lane") if lanes else "one p2p stream"
    if link["reason"]:
        way += f" (no lanes: {link['reason']})"
    out, back = link["sent_bytes_per_second"] / 1e6, link["received_bytes_per_second"] / 1e6
    return f"{way}, RTT {rtt_ms:.0f} ms, {out:.1f} MB/s out, {back:.1f} in"


def _count_bytes(core: Core, peer_id: str, sent_bytes: int, received_bytes: int) -> None:
    by_peer = core.numbers.bytes_by_peer
    if peer_id not in by_peer and len(by_peer) >= MAX_LABELLED_PEERS:
        peer_id = _OTHER_PEERS
    before = by_peer.get(peer_id, (0, 0))
    by_peer[peer_id] = moved = (before[0] + sent_bytes, before[1] + received_bytes)
    for direction, num_bytes in zip(("sent", "received"), moved, strict=True):
        labels = {"peer": peer_id, "direction": direction}
        core.metrics.set(telemetry.PEER_LINK_BYTES, num_bytes, labels)


def describe_attempt(attempt: AttemptTimeline) -> str:
    """One line: how it ended, how long each phase took, how many bytes moved and how fast."""
    seconds = attempt.seconds_by_phase()
    phases = " + ".join(f"{phase} {value:.2f}" for phase, value in seconds.items())
    moved = f"{attempt.sent_bytes / 1e6:.1f} MB out, {attempt.received_bytes / 1e6:.1f} in"
    speed = f"{attempt.averaging_bytes_per_second / 1e6:.1f} MB/s"
    head = f"step {attempt.outer_step} attempt {attempt.attempt} {attempt.outcome.value}"
    reason = f" ({attempt.reason})" if attempt.outcome is not AttemptOutcome.COMMITTED else ""
    return f"{head}{reason}: {phases or 'no phase'} s; {moved}, {speed}"
