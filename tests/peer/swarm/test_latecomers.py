"""Who holds the swarm up is left out for longer and longer, and comes back when it is in time."""

from peer.swarm.latecomers import LEAST_SILENCE_SECONDS, Latecomers, late_in_failed
from peer.swarm.pace import Pace

TOKENS = {"a": 100, "b": 100, "slow": 100}


def _step(
    latecomers: Latecomers, *, late: tuple[str, ...] = (), late_seconds: float = 0.0
) -> list[str]:
    """A step of two seconds beside the waiting, with whoever is not left out."""
    tokens = {p: n for p, n in TOKENS.items() if p not in (*late, *latecomers.left_out)}
    return latecomers.step_ended(
        late=late,
        tokens_by_peer=tokens,
        late_seconds_by_peer={"slow": late_seconds} if "slow" in tokens else {},
        round_seconds=2.0 + late_seconds,
    )


def _num_steps_left_out(latecomers: Latecomers) -> int:
    num_steps = 0
    while latecomers.left_out:
        assert _step(latecomers) == []
        num_steps += 1
    return num_steps


def test_late_again_and_again_is_left_out_for_longer() -> None:
    latecomers, found = Latecomers(), []
    for _ in range(8):
        assert _step(latecomers, late=("slow",)) == ["slow"]
        found.append(_num_steps_left_out(latecomers))
        assert latecomers.on_trial == {"slow"}
    assert found == [2, 4, 8, 16, 32, 64, 64, 64]
    assert _step(latecomers) == []
    assert not latecomers.on_trial and not latecomers.left_out


def test_who_costs_more_tokens_than_it_brings_is_left_out() -> None:
    latecomers = Latecomers()
    assert _step(latecomers, late_seconds=1.0) == []  # two thirds of the tokens in two thirds
    assert _step(latecomers, late_seconds=10.0) == []  # once may be chance
    assert _step(latecomers, late_seconds=0.0) == []
    assert _step(latecomers, late_seconds=10.0) == []
    assert _step(latecomers, late_seconds=10.0) == ["slow"]
    assert _num_steps_left_out(latecomers) == 2
    assert _step(latecomers, late_seconds=10.0) == ["slow"]  # on trial once is enough
    assert _num_steps_left_out(latecomers) == 4


def test_nobody_is_left_out_for_short_waits() -> None:
    assert _step(Latecomers(), late_seconds=0.9) == []


def test_a_failed_reduction_blames_whom_it_mostly_waited_for() -> None:
    late = {"a": 0.4, "b": 1.2, "slow": 3.0}
    assert late_in_failed(late, elapsed_seconds=4.0) == {"slow"}
    assert late_in_failed({"slow": 0.4}, elapsed_seconds=0.4) == frozenset()


def test_all_who_waited_for_a_silent_member_remember_it() -> None:
    """Whoever is quickest to give up tells the others, who have waited almost as long."""
    pace = Pace()
    for _ in range(3):
        pace.add_wait(0.001)
    seconds = pace.stall_seconds() - 0.1
    assert seconds > LEAST_SILENCE_SECONDS
    assert late_in_failed({"silent": seconds}, elapsed_seconds=seconds) == {"silent"}
