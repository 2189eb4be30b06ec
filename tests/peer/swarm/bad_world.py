"""Worlds drawn from a seed, for the round machine."""

import random
from dataclasses import replace

from tests.peer.swarm.round_simulation import World


def bad_world(seed: int, *, num_members: int | None = None) -> World:
    """A world drawn from a seed: from mild to hopeless for 20 s, then healed."""
    rng = random.Random(seed * 7919 + 13)
    num_members = num_members or rng.randint(1, 5)
    world = World(
        num_members=num_members,
        loss_ratio=rng.choice([0.0, 0.1, 0.3, 0.5]),
        duplicate_ratio=rng.choice([0.0, 0.2]),
        delay_seconds=rng.choice([0.01, 0.05, 0.2]),
        crashes_per_second=rng.choice([0.0, 0.1, 0.3, 0.6]),
        reduce_failure_ratio=rng.choice([0.0, 0.3, 0.6]),
        bad_seconds=20.0,
        coordinator_down_ratio=rng.choice([0.0, 0.3, 1.0]),
        late_ratio=rng.choice([0.05, 0.2]),
        late_factor=rng.choice([10.0, 40.0]),
        crash_per_effect_ratio=rng.choice([0.0, 0.01, 0.05]),
        crash_after_promise_ratio=rng.choice([0.0, 0.3]),
        restart_seconds=rng.choice([0.3, 3.0]),
        due_seconds=rng.choice([0.5, 2.0, 6.0]),
        cut_ratio=rng.choice([0.0, 0.0, 0.3]),
    )
    peers, left_out_ratio = range(num_members), rng.choice([0.0, 0.3, 1.0])
    pairs = [(f"peer{p}", f"peer{q}") for p in peers for q in peers if p != q]
    return replace(
        world,
        left_out_pairs=tuple(pair for pair in pairs if rng.random() < left_out_ratio),
        is_on_trial=rng.random() < 0.5,
        blame_ratio=rng.choice([0.0, 0.5, 1.0]),
    )
