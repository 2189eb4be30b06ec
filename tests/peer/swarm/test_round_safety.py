"""The round machine under loss, delay, duplication, reordering and crashes: one value per outer
step, and progress.

Each rule that is left out (in the world around the machine) must lead to two certificates with
different values in a fixed range of seeds, and with the rule in place the same seeds must lead to
none.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.swarm.pace import Pace
from protos.muster.v1 import rounds_pb2
from tests.peer.swarm.bad_world import bad_world
from tests.peer.swarm.round_simulation import Simulation, Weakness, World

NUM_SEEDS = 1000

CRASHY = World(
    num_members=2,
    loss_ratio=0.3,
    delay_seconds=0.05,
    late_ratio=0.2,
    late_factor=10.0,
    crash_per_effect_ratio=0.1,
    reduce_failure_ratio=0.5,
    restart_seconds=0.3,
    bad_seconds=20.0,
    due_seconds=0.5,
)
FORGETFUL_FOUR = World(
    num_members=4,
    loss_ratio=0.5,
    delay_seconds=0.1,
    late_ratio=0.4,
    late_factor=60.0,
    crash_after_promise_ratio=0.9,
    restart_seconds=0.3,
    bad_seconds=20.0,
    due_seconds=0.5,
    cut_ratio=0.6,
)
CUT_IN_TWO = World(
    num_members=2,
    delay_seconds=0.05,
    late_ratio=0.2,
    late_factor=10.0,
    crash_per_effect_ratio=0.03,
    reduce_failure_ratio=0.5,
    restart_seconds=0.3,
    bad_seconds=20.0,
    due_seconds=0.5,
    cut_ratio=1.0,
)


def _play(seed: int, world: World, weakness: Weakness = Weakness.NONE) -> Simulation:
    simulation = Simulation(seed, world, weakness)
    simulation.run(until_seconds=400.0)
    return simulation


@given(seed=st.integers(min_value=0, max_value=2**31))
@settings(max_examples=600, deadline=None)
def test_one_value_and_progress(seed: int) -> None:
    simulation = _play(seed, bad_world(seed))
    assert len(simulation.values) == 1, "exactly one value is decided"
    for member in simulation.members.values():
        assert member.certificate is not None, "everybody has the certificate once healed"
        assert member.certificate.value in simulation.values


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("others_seconds", [(18.0, 18.0, 18.0), (30.0, 31.0, 58.0)])
def test_who_averages_first_does_not_cut_the_others_off(
    first: int, others_seconds: tuple[float, ...]
) -> None:
    """Before rounds were measured. Up to 30 were discarded when votes were awaited for 6 s."""
    reduce_seconds = (*others_seconds[:first], 5.0, *others_seconds[first:])
    world = World(
        num_members=4, timing=Pace().timing(), reduce_seconds=reduce_seconds, fetch_seconds=20.0
    )
    for seed in range(10):
        simulation = _play(seed, world)
        assert len(simulation.values) == 1
        assert simulation.num_attempts_discarded == 0


def test_the_first_rounds_take_as_long_as_bytes_move() -> None:
    """Nobody knows the links yet. A deadline of 60 s cut every attempt off, until doubling had made
    it longer than the slowest link takes.
    """
    for moves_seconds, may_be_cut_off in ((1.0, False), (0.0, True)):
        world = World(
            num_members=3,
            timing=Pace().timing(),
            reduce_seconds=(100.0, 200.0, 190.0),
            fetch_seconds=150.0,
            moves_seconds=moves_seconds,
        )
        simulation = _play(0, world)
        assert len(simulation.values) == 1
        assert (simulation.num_attempts_discarded > 0) == may_be_cut_off


def test_bytes_that_take_long_to_fetch_cost_no_attempt() -> None:
    """Some fail to average what others have voted for; their bytes come by another way."""
    quick, slow = (
        World(
            num_members=4,
            timing=Pace().timing(),
            reduce_failure_ratio=0.5,
            bad_seconds=20.0,
            late_ratio=0.0,
            fetch_seconds=fetch_seconds,
        )
        for fetch_seconds in (0.5, 50.0)
    )
    for seed in range(30):
        discarded = [_play(seed, world).num_attempts_discarded for world in (quick, slow)]
        assert discarded[1] <= discarded[0], (seed, discarded)


@pytest.mark.parametrize("num_members", [1, 2, 3, 4, 5])
def test_good_world_needs_one_attempt(num_members: int) -> None:
    for seed in range(20):
        simulation = _play(seed, World(num_members=num_members))
        assert len(simulation.values) == 1
        assert simulation.num_attempts_discarded == 0
        assert simulation.now_seconds < 60.0


@pytest.mark.parametrize(("num_members", "num_killed"), [(12, 4), (4, 2), (5, 2), (8, 3)])
def test_losing_several_at_once_costs_one_round(num_members: int, num_killed: int) -> None:
    """The lost reduction is repeated once, without the dead; nothing is restarted."""
    world = World(num_members=num_members, num_killed_in_reduce=num_killed, due_seconds=0.5)
    num_struck = 0
    for seed in range(25):
        simulation = _play(seed, world)
        survivors = [m for m in simulation.members.values() if not m.is_dead]
        if not simulation.killed_seconds:  # the seed left some of them out of the first group
            continue
        num_struck += 1
        assert len(survivors) == num_members - num_killed
        assert len(simulation.values) == 1
        assert all(member.certificate is not None for member in survivors)
        assert max(member.num_reductions for member in survivors) == 2
        assert simulation.now_seconds - simulation.killed_seconds < 10.0
    assert num_struck >= 15


@pytest.mark.parametrize(
    ("num_members", "num_poisoners", "num_slanderers", "most_reductions"),
    [
        (3, 1, 0, 4),
        (4, 1, 0, 4),
        (7, 2, 0, 4),
        (2, 0, 1, 2),
        (3, 0, 1, 4),
        (4, 0, 1, 4),
        (7, 1, 1, 6),
    ],
)
def test_liars_are_left_out_and_cost_few_attempts(
    num_members: int, num_poisoners: int, num_slanderers: int, most_reductions: int
) -> None:
    world = World(
        num_members=num_members,
        num_poisoners=num_poisoners,
        num_slanderers=num_slanderers,
        due_seconds=0.5,
    )
    for seed in range(25):
        simulation = _play(seed, world)
        assert len(simulation.values) == 1
        honest = set(simulation.members) - simulation.poisoners - simulation.slanderers
        for peer in honest:
            member = simulation.members[peer]
            assert member.certificate is not None
            assert member.num_reductions <= most_reductions, seed
            held = rounds_pb2.Contributions.FromString(member.certificate.contributions)
            brought = {c.peer_id for c in held.contributions if c.ranges}
            assert not brought & simulation.poisoners


@pytest.mark.parametrize(
    ("num_members", "left_out", "has_coordinator"),
    [(2, "01 10", False), (2, "01 10", True), (3, "01 12 20", True), (3, "01 12 20", False)],
)
def test_members_that_leave_each_other_out_do_not_overtake_one_another(
    num_members: int, left_out: str, has_coordinator: bool
) -> None:
    """A leader that has been heard in an attempt is followed there, however slow it is said to
    be.
    """
    for seed in range(12):
        world = World(
            num_members=num_members,
            delay_seconds=(0.02, 0.1)[seed % 2],
            due_seconds=0.05,
            left_out_pairs=tuple((f"peer{pair[0]}", f"peer{pair[1]}") for pair in left_out.split()),
            bad_seconds=0.0 if has_coordinator else 60.0,
            coordinator_down_ratio=1.0,
            late_ratio=0.0,
        )
        simulation = Simulation(seed, world)
        simulation.run(until_seconds=20.0)
        assert len(simulation.values) == 1
        assert all(m.certificate is not None for m in simulation.members.values()), seed
        assert simulation.num_attempts_discarded <= 2 * num_members, seed


@pytest.mark.parametrize(
    ("weakness", "world"),
    [
        (Weakness.VOTE_NOT_DURABLE, CRASHY),
        (Weakness.PROMISE_NOT_DURABLE, FORGETFUL_FOUR),
        (Weakness.COORDINATOR_SIGNS_EARLY, CUT_IN_TWO),
    ],
)
def test_every_rule_is_needed(weakness: Weakness, world: World) -> None:
    seeds = range(NUM_SEEDS)
    violated = next((s for s in seeds if len(_play(s, world, weakness).values) > 1), None)
    assert violated is not None, f"{weakness.name} breaks agreement within {NUM_SEEDS} seeds"
    for seed in range(max(0, violated - 100), violated + 100):
        assert len(_play(seed, world).values) == 1, "with the rule in place it holds"
