"""Patience follows what was measured: short where rounds are short, longer where they vary."""

from peer.swarm.pace import Pace, reduce_deadline_seconds


def _pace(reduce_seconds: list[float], *, wait_seconds: float = 0.05) -> Pace:
    pace = Pace()
    for seconds in reduce_seconds:
        pace.add(form_seconds=0.5, reduce_seconds=seconds, agree_seconds=0.05)
        pace.add_wait(wait_seconds)
    return pace


def test_generous_until_three_rounds_were_measured() -> None:
    assert _pace([0.1, 0.1]).timing().reduce_wait_seconds == 60.0
    assert Pace().stall_seconds() == 15.0
    assert Pace().call_seconds == 4.0
    assert not _pace([0.1, 0.1]).is_learnt and _pace([0.1] * 3).is_learnt


def test_silence_is_learnt_from_the_first_reduction() -> None:
    """A member that was restarted may have made a single round when another stops."""
    assert _pace([0.1], wait_seconds=0.05).stall_seconds() == 0.95
    assert _pace([0.1], wait_seconds=1.0).stall_seconds() == 4.75
    assert _pace([0.1] * 3, wait_seconds=1.0).stall_seconds() == 2.75


def test_quick_rounds_make_short_deadlines() -> None:
    pace = _pace([0.1] * 8)
    for _ in range(64):
        pace.add_call(0.002)
    assert pace.stall_seconds() < 1.0 and pace.call_seconds < 0.8
    timing = pace.timing()
    assert timing.reduce_wait_seconds == 4.0 and timing.agree_wait_seconds == 1.0
    assert timing.exchange_wait_seconds + timing.rejoin_wait_seconds < 2.0


def test_calls_that_a_stopped_member_answered_late_do_not_make_others_patient() -> None:
    pace = Pace()
    for number in range(64):
        pace.add_call(0.7 if number % 4 == 0 else 0.002)
    assert pace.call_seconds < 0.8
    for _ in range(64):
        pace.add_call(0.2)
    assert pace.call_seconds > 1.5


def test_slow_answers_to_a_process_that_has_just_started_do_not_make_it_patient() -> None:
    pace = Pace()
    for seconds in (0.3, 0.2, 0.004, 0.25, 0.003, 0.005):
        pace.add_call(seconds)
    assert pace.call_seconds < 0.8
    for _ in range(16):
        pace.add_call(0.25)
    assert pace.call_seconds == 1.75


def test_slow_and_uneven_rounds_make_long_ones() -> None:
    even, uneven = _pace([20.0] * 8), _pace([10.0, 30.0] * 4)
    assert even.timing().reduce_wait_seconds == 40.75
    assert uneven.timing().reduce_wait_seconds == 80.75
    assert _pace([1.0] * 4, wait_seconds=5.0).stall_seconds() == 10.75


def test_deadlines_follow_the_last_rounds_only() -> None:
    pace = _pace([50.0] * 16 + [0.2] * 16)
    assert pace.timing().reduce_wait_seconds == 4.0


def test_each_failed_reduction_of_a_step_makes_the_next_more_patient() -> None:
    pace = _pace([0.1] * 8)
    stalls = [pace.stall_seconds(num_failed) for num_failed in range(8)]
    assert stalls[0] < 2.0 and stalls[3] == 8 * stalls[0] and stalls[7] == 60.0
    assert pace.stall_seconds(5000) == 60.0

    def deadline(expected_seconds: float, num_failed: int) -> float:
        timing = pace.timing()
        return reduce_deadline_seconds(
            timing, expected_seconds=expected_seconds, num_failed=num_failed
        )

    assert [deadline(0.0, failed) for failed in range(4)] == [4.0, 8.0, 16.0, 32.0]
    assert deadline(30.0, 0) == 62.0 and deadline(30.0, 5000) == 3600.0


def test_where_steps_are_far_apart_members_and_bytes_may_be_late() -> None:
    pace = _pace([0.1] * 8)
    assert pace.timing().form_wait_seconds == 4.0
    for _ in range(3):
        pace.add_round(21.0)
    assert pace.timing().form_wait_seconds == pace.timing().reduce_wait_seconds == 7.0
    for _ in range(9):
        pace.add_round(300.0)
    timing = pace.timing()
    assert timing.reduce_wait_seconds == 100.0 and timing.form_wait_seconds == 60.0
