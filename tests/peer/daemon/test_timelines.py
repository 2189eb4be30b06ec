"""What becomes of an attempt's timeline: metrics, status, heartbeat, and a line for the owner."""

import json
from pathlib import Path

from prometheus_client import generate_latest

from peer.cli.status import _round_rows
from peer.daemon.core import Core
from peer.daemon.reports import Report, SessionNumbers, read_status
from peer.daemon.timelines import NUM_KEPT_ATTEMPTS, note_discarded, take_attempt
from peer.metrics import PeerMetrics
from peer.swarm.timeline import AttemptTimeline, PairWay, PhaseSpan
from protos.contract.telemetry import ATTEMPT_PHASES, AttemptOutcome, RoundPhase


def _attempt(
    number: int, outcome: AttemptOutcome = AttemptOutcome.COMMITTED, reason: str = ""
) -> AttemptTimeline:
    """Phases of 0.1, 0.2, 0.3, ... seconds; a megabyte out and two in with each."""
    spans, begin = [], 1000.0
    for index, phase in enumerate(ATTEMPT_PHASES, start=1):
        end = begin + index / 10
        spans.append(
            PhaseSpan(
                phase=phase,
                begin_unix_seconds=begin,
                end_unix_seconds=end,
                sent_bytes=1_000_000,
                received_bytes=2_000_000,
            )
        )
        begin = end
    return AttemptTimeline(
        incarnation=1,
        outer_step=7,
        attempt=number,
        outcome=outcome,
        reason=reason,
        spans=tuple(spans),
        bytes_by_peer={"p1": (4_000_000, 6_000_000), "p2": (1_000_000, 4_000_000)},
        ways={
            "p1": PairWay(num_lanes=3, rtt_seconds=0.15, reason=""),
            "p2": PairWay(num_lanes=0, rtt_seconds=0.05, reason="it does not listen"),
        },
    )


def _core() -> tuple[Core, list[Report]]:
    reports: list[Report] = []
    core = Core(
        numbers=SessionNumbers(peer_id="me", name="me"),
        metrics=PeerMetrics(),
        report=reports.append,
        on_drain=lambda action: None,
    )
    return core, reports


def test_metrics_hold_phases_bandwidth_and_bytes_by_peer() -> None:
    core, reports = _core()
    note_discarded(core, outer_step=7, attempt=1, reason="p2 is silent")
    take_attempt(core, _attempt(1, AttemptOutcome.DISCARDED, "p2 is silent"))
    take_attempt(core, _attempt(2))
    text = generate_latest(core.metrics.registry).decode()
    for line in (
        'muster_peer_attempts_total{outcome="committed"} 1.0',
        'muster_peer_attempts_total{outcome="discarded"} 1.0',
        'muster_peer_round_phase_seconds_count{phase="exchange"} 1.0',
        "muster_peer_discarded_attempt_seconds_total 1.5",
        'muster_peer_link_bytes{direction="sent",peer="p1"} 8e+06',
        'muster_peer_link_bytes{direction="received",peer="p2"} 8e+06',
        'muster_peer_link_lanes{peer="p1"} 3.0',
        'muster_peer_link_rtt_seconds{peer="p2"} 0.05',
        'muster_peer_link_bytes_per_second{direction="sent",peer="p1"} 8e+06',
    ):
        assert line in text
    assert "muster_peer_averaging_bytes_per_second 1.2e+07" in text.replace("1.2000000", "1.2")
    assert [report.fields["outcome"] for report in reports] == ["discarded", "committed"]
    assert "attempt 1 discarded (p2 is silent)" in reports[0].text


def test_heartbeat_says_the_last_committed_attempt_and_the_last_reason() -> None:
    core, _ = _core()
    assert core.numbers.claims().exchange_seconds == 0.0
    take_attempt(core, _attempt(2))
    note_discarded(core, outer_step=8, attempt=1, reason="p1 is gone")
    take_attempt(core, _attempt(1, AttemptOutcome.DISCARDED, "p1 is gone"))
    claims = core.numbers.claims()
    assert (claims.form_seconds, claims.exchange_seconds, claims.apply_seconds) == (0.1, 0.2, 0.5)
    assert round(claims.averaging_bytes_per_second) == 12_000_000
    assert claims.discard_reason == "step 8 attempt 1: p1 is gone"
    assert claims.num_attempts_discarded == 1


def test_status_shows_the_newest_attempts(tmp_path: Path) -> None:
    core, _ = _core()
    for number in range(NUM_KEPT_ATTEMPTS + 3):
        take_attempt(core, _attempt(number))
    assert len(core.numbers.attempts) == NUM_KEPT_ATTEMPTS
    core.numbers.save(tmp_path / "status.json")
    found = json.loads((tmp_path / "status.json").read_text())
    assert found["links"]["p1"]["num_lanes"] == 3
    assert round(found["links"]["p2"]["received_bytes_per_second"]) == 8_000_000
    by_peer = [text for title, text in _round_rows(found) if not title]
    assert by_peer[0].endswith("; 3 lanes, RTT 150 ms, 8.0 MB/s out, 12.0 in")
    assert "one p2p stream (no lanes: it does not listen), RTT 50 ms" in by_peer[1]
    rows = dict(_round_rows(found))
    assert rows["round"].startswith(f"step 7 attempt {NUM_KEPT_ATTEMPTS + 2} committed: form 0.10")
    assert "5.0 MB out, 10.0 in, 12.0 MB/s" in rows["round"]
    assert rows["attempts"] == "0 committed, 0 discarded"
    assert "p2: 11.0 MB sent, 44.0 received" in rows[""]


def test_status_reads_what_an_older_package_wrote(tmp_path: Path) -> None:
    core, _ = _core()
    take_attempt(core, _attempt(1))
    path = tmp_path / "run" / "status.json"
    path.parent.mkdir()
    core.numbers.save(path)
    found = json.loads(path.read_text())
    del found["links"], found["attempts"][0]["ways"]
    path.write_text(json.dumps(found))
    older = read_status(tmp_path)
    assert older is not None and older["name"] == "me"
    assert [text for title, text in _round_rows(older) if not title] == [
        "p1: 4.0 MB sent, 6.0 received",
        "p2: 1.0 MB sent, 4.0 received",
    ]


def test_phases_that_were_not_reached_are_missing_not_zero() -> None:
    core, reports = _core()
    short = _attempt(1, AttemptOutcome.DISCARDED, "nobody came")
    spans = tuple(span for span in short.spans if span.phase is RoundPhase.FORM)
    take_attempt(core, AttemptTimeline.from_plain(short.to_plain() | {"spans": [], "attempt": 3}))
    assert "no phase" in reports[0].text
    assert spans and core.numbers.last_committed is None
