"""Phases and bytes of attempts: booked once, in order, and the same after a trip over the
channel.
"""

from peer.swarm.timeline import AttemptTimeline, PairWay, TimelineRecorder
from protos.contract.telemetry import AttemptOutcome, RoundPhase

NEAR = PairWay(num_lanes=0, rtt_seconds=0.001, reason="")
FAR = PairWay(num_lanes=2, rtt_seconds=0.1, reason="")


def test_bytes_and_seconds_go_to_the_phase_they_happened_in() -> None:
    recorder = TimelineRecorder(incarnation=1, outer_step=7)
    recorder.enter(RoundPhase.FORM, now_unix_seconds=100.0, moved={"b": (50, 60)})
    recorder.enter(RoundPhase.EXCHANGE, now_unix_seconds=101.0, moved={"b": (55, 60)})
    recorder.enter(RoundPhase.REDUCE, now_unix_seconds=103.0, moved={"b": (155, 90), "c": (1, 2)})
    recorder.enter(RoundPhase.AGREE, now_unix_seconds=104.0, moved={"b": (165, 190), "c": (1, 2)})
    timeline = recorder.end(
        AttemptOutcome.COMMITTED,
        attempt=0,
        reason="certified",
        now_unix_seconds=104.5,
        moved={"a": (0, 0), "b": (165, 190), "c": (1, 2)},
        ways={"a": NEAR, "b": FAR},
    )
    assert timeline.seconds_by_phase() == {
        "form": 1.0,
        "exchange": 2.0,
        "reduce": 1.0,
        "agree": 0.5,
    }
    assert timeline.bytes_by_peer == {"b": (115, 130), "c": (1, 2)}
    assert (timeline.sent_bytes, timeline.received_bytes) == (116, 132)
    assert timeline.averaging_bytes_per_second == (101 + 32 + 10 + 100) / 3.0
    assert timeline.speed_by_peer() == {"b": (115 / 3.0, 130 / 3.0), "c": (1 / 3.0, 2 / 3.0)}
    assert timeline.ways == {"b": FAR}, "a took no part"
    assert AttemptTimeline.from_plain(timeline.to_plain()) == timeline


def test_the_next_attempt_begins_with_nothing() -> None:
    recorder = TimelineRecorder(incarnation=1, outer_step=7)
    recorder.enter(RoundPhase.FORM, now_unix_seconds=1.0, moved={})
    first = recorder.end(
        AttemptOutcome.DISCARDED,
        attempt=0,
        reason="x",
        now_unix_seconds=2.0,
        moved={"b": (9, 9)},
        ways={},
    )
    assert first.bytes_by_peer == {"b": (9, 9)}
    assert recorder.phase is None
    second = recorder.end(
        AttemptOutcome.DISCARDED,
        attempt=1,
        reason="y",
        now_unix_seconds=3.0,
        moved={"b": (9, 9)},
        ways={},
    )
    assert second.spans == () and second.bytes_by_peer == {}
