"""Numbers of a session: link speeds from rounds."""

from peer.daemon.reports import SessionNumbers
from peer.swarm.timeline import AttemptTimeline, PhaseSpan
from protos.contract.telemetry import AttemptOutcome, RoundPhase


def timeline(*spans: tuple[RoundPhase, float, int, int]) -> AttemptTimeline:
    found, now = [], 100.0
    for phase, seconds, sent, received in spans:
        found.append(
            PhaseSpan(
                phase=phase,
                begin_unix_seconds=now,
                end_unix_seconds=now + seconds,
                sent_bytes=sent,
                received_bytes=received,
            )
        )
        now += seconds
    return AttemptTimeline(
        incarnation=1,
        outer_step=1,
        attempt=1,
        outcome=AttemptOutcome.COMMITTED,
        reason="",
        spans=tuple(found),
        bytes_by_peer={},
        ways={},
    )


def test_links_are_the_best_of_recent_rounds() -> None:
    numbers = SessionNumbers(peer_id="a", name="a")
    numbers.note_links(timeline((RoundPhase.FORM, 5.0, 10, 10)))
    assert numbers.upload_bytes_per_second == 0, "nothing was averaged"
    numbers.note_links(
        timeline(
            (RoundPhase.FORM, 5.0, 10, 10),
            (RoundPhase.EXCHANGE, 1.0, 600, 900),
            (RoundPhase.REDUCE, 1.0, 400, 100),
        )
    )
    assert numbers.claims().upload_bytes_per_second == 500
    assert numbers.claims().download_bytes_per_second == 500
    numbers.note_links(timeline((RoundPhase.EXCHANGE, 10.0, 100, 10_000)))
    assert numbers.upload_bytes_per_second == 450, "an old best fades"
    assert numbers.download_bytes_per_second == 1000
