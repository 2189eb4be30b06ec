"""When a silent child is killed: never before ten of its own turns, and only in awake time."""

from peer.daemon.child_watch import ChildWatch, start_seconds


def silence(watch: ChildWatch, *, begin: float, seconds: float, tick_seconds: float) -> float:
    """Tick through silence; returns when the verdict came, or infinity."""
    now = begin
    while now < begin + seconds:
        now += tick_seconds
        if watch.tick(now):
            return now - begin
    return float("inf")


def test_silence_is_measured_in_its_own_turns() -> None:
    for turn_seconds, allowed_seconds in ((0.1, 10.0), (3.0, 30.0)):
        watch = ChildWatch()
        watch.tick(0.0)
        watch.turn(turn_seconds)
        found = silence(watch, begin=0.0, seconds=100.0, tick_seconds=0.25)
        assert allowed_seconds < found <= allowed_seconds + 0.5


def test_the_verdict_has_the_numbers() -> None:
    watch = ChildWatch()
    watch.tick(0.0)
    watch.turn(2.0)
    verdicts = [watch.tick(float(now)) for now in range(1, 25)]
    assert "no progress for 21 s" in next(filter(None, verdicts))
    assert "took 2.0 s (20 s are allowed)" in next(filter(None, verdicts))


def test_a_start_has_time_by_the_models_size_and_more_after_one_that_was_too_short() -> None:
    assert start_seconds(0) == 300.0
    assert start_seconds(8_000_000_000) == 700.0
    watch = ChildWatch()
    watch.tick(0.0)
    for now, allowed in ((0.0, 300.0), (2000.0, 600.0), (4000.0, 1200.0)):
        watch.begin(start_seconds(0))
        found = silence(watch, begin=now, seconds=1500.0, tick_seconds=0.5)
        assert allowed - 1.0 < found <= allowed + 1.0
        watch.forget()
    watch.begin(start_seconds(0))
    watch.turn(0.1)
    watch.forget()
    watch.begin(start_seconds(0))
    verdicts = [watch.tick(6000.0 + now) for now in range(310)]
    assert next(filter(None, verdicts)).startswith("not ready 301 s after it was told what to do")
    assert "(300 s are allowed for a model of this size" in next(filter(None, verdicts))


def test_a_child_that_waits_or_is_told_to_end_is_not_watched() -> None:
    watch = ChildWatch()
    assert silence(watch, begin=0.0, seconds=1000.0, tick_seconds=0.5) == float("inf")
    watch.turn(0.1)
    watch.forget()
    assert silence(watch, begin=1000.0, seconds=1000.0, tick_seconds=0.5) == float("inf")


def test_time_in_which_the_daemon_slept_counts_little() -> None:
    watch = ChildWatch()
    watch.tick(0.0)
    watch.turn(0.1)
    assert not watch.tick(3600.0)
    watch.turn(0.1)
    assert not watch.tick(3601.0)


def test_turns_that_come_keep_it_alive() -> None:
    watch = ChildWatch()
    for now in range(100):
        watch.turn(0.5)
        assert not watch.tick(float(now))
