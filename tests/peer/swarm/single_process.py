"""What one process computes from the contributions that a swarm averages, with `sync` and fp32."""

import numpy as np

from peer.model.init import initial_vector
from peer.swarm.exact_update import SyncUpdate
from tests.peer.swarm.swarm_hub import NUM_VALUES, SPEC


class Expected:
    """The state that one process computes from the same contributions."""

    def __init__(self) -> None:
        self.params = initial_vector(SPEC)
        self.exp_avg = np.zeros(NUM_VALUES, dtype=np.float32)
        self.exp_avg_sq = np.zeros(NUM_VALUES, dtype=np.float32)
        self.schedule_tokens = 0

    def apply(self, step: int, parts: dict[str, tuple[np.ndarray, int]]) -> None:
        tokens = sum(num_tokens for _, num_tokens in parts.values())
        total = np.zeros(NUM_VALUES, dtype=np.float32)
        for peer_id in sorted(parts):
            values, num_tokens = parts[peer_id]
            total = total + np.float32(num_tokens / tokens) * values
        SyncUpdate(SPEC).apply(
            self.params,
            self.exp_avg,
            self.exp_avg_sq,
            total,
            update_number=step,
            schedule_tokens=self.schedule_tokens,
            cooldown_start_tokens=SPEC.budget_tokens,
            budget_tokens=SPEC.budget_tokens,
        )
        self.schedule_tokens += tokens
