"""Rates of the own link: the best two seconds of a long enough round, without its first second."""

from peer.swarm.link_meter import LinkMeter


def _round(meter: LinkMeter, rates: list[int], *, begin_seconds: float = 0.0) -> None:
    """A round with so many bytes in each half second, twice as many in as out."""
    meter.begin(begin_seconds)
    for index, rate in enumerate(rates):
        now = begin_seconds + 0.5 * index + 0.1
        meter.add(now, sent_bytes=rate, received_bytes=2 * rate)
    meter.end()


def test_first_second_and_last_half_do_not_count() -> None:
    meter = LinkMeter()
    _round(meter, [900, 900, 10, 20, 20, 20, 20, 10, 900])
    assert meter.upload_bytes_per_second == 40.0
    assert meter.download_bytes_per_second == 80.0


def test_short_rounds_say_nothing() -> None:
    meter = LinkMeter()
    _round(meter, [50, 50, 50, 50])
    assert meter.upload_bytes_per_second == 0.0


def test_the_best_of_the_last_rounds_counts_and_is_forgotten_in_time() -> None:
    meter = LinkMeter()
    _round(meter, [100] * 9, begin_seconds=5.0)
    for _ in range(7):
        _round(meter, [10] * 9)
    assert meter.upload_bytes_per_second == 200.0
    _round(meter, [10] * 9)
    assert meter.upload_bytes_per_second == 20.0


def test_bytes_between_rounds_are_not_counted() -> None:
    meter = LinkMeter()
    meter.add(1.0, sent_bytes=100, received_bytes=100)
    _round(meter, [10] * 9)
    meter.add(9.0, sent_bytes=1000, received_bytes=1000)
    assert meter.upload_bytes_per_second == 20.0
