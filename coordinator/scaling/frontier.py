"""Which observations lie near the compute frontier: the best loss that their compute has bought.

Models far from it (much too large or small for their tokens) obey no simple law, and with them the
general form degenerates (E -> 0), so the filter is part of the method, not a convenience.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NEAR_RATIO = 0.15
"""A row is near when its loss is at most 15 % above the best at its compute."""
_SAME_COMPUTE = 1.1


def best_loss_nats(compute_flop: Array, loss_nats: Array) -> Array:
    """Least loss that at most (1.1 times) the compute of each row has reached, (n,)."""
    order = np.argsort(compute_flop)
    least = np.minimum.accumulate(loss_nats[order])
    last = np.searchsorted(compute_flop[order], compute_flop * _SAME_COMPUTE, side="right") - 1
    return np.asarray(least[last])


def is_near_frontier(
    compute_flop: Array, loss_nats: Array, *, near_ratio: float = NEAR_RATIO
) -> NDArray[np.bool_]:
    """True for rows whose loss is within `near_ratio` of the best at their compute, (n,)."""
    return np.asarray(loss_nats <= best_loss_nats(compute_flop, loss_nats) * (1 + near_ratio))
