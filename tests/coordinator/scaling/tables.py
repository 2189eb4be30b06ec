"""The public points that the tests fit, and made-up ones whose truth is known."""

from pathlib import Path

import numpy as np

from coordinator.scaling.laws import LossLaw
from coordinator.scaling.observations import Observation, Observations, observations_from_csv

DATA_DIR = Path(__file__).parent / "data"
CHINCHILLA_CSV = DATA_DIR / "chinchilla_points.csv"
PORIAN_CSV = DATA_DIR / "porian_tuned.csv"
TINY_CSV = DATA_DIR / "tiny_bytes.csv"
TRUTH = LossLaw(e_nats=1.7, a=900.0, b=5000.0, alpha=0.42, beta=0.45, kappa=0.85)


def read(path: Path) -> Observations:
    """A table beside this file."""
    return observations_from_csv(path.read_text(encoding="utf-8"), name=path.name)


def chinchilla_240() -> Observations:
    """Hoffmann's points without the five highest losses, as Besiroglu takes them."""
    table = read(CHINCHILLA_CSV)
    return table.where(table.loss_nats < np.sort(table.loss_nats)[-5])


def made_up(
    law: LossLaw = TRUTH,
    *,
    num_budgets: int = 8,
    num_sizes: int = 7,
    first_flop: float = 1e17,
    noise_ratio: float = 0.003,
    seed: int = 0,
    unit_n: float = 1.0,
) -> Observations:
    """A sweep: `num_sizes` sizes round the best one at `num_budgets` computes, each x 3 dearer."""
    generator = np.random.default_rng(seed)
    rows = []
    for budget in range(num_budgets):
        compute = first_flop * 3.0**budget
        best = law.optimum(compute).params_n
        for size in best * np.exp(np.linspace(-1.2, 1.2, num_sizes)):
            tokens = compute / 6 / size
            loss = float(law.loss_nats(size, tokens)) * np.exp(
                noise_ratio * generator.standard_normal()
            )
            rows.append(
                Observation(
                    params_n=float(size * unit_n),
                    tokens_d=float(tokens / unit_n),
                    compute_flop=float(compute),
                    loss_nats=float(loss),
                )
            )
    return Observations.of(rows)
