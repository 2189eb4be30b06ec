"""Which precision local ranks compute in."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peer.train import node_step
from peer.train.node_step import NodeStep
from peer.train.step import Precision
from tests.peer.model.tiny import BASE


class Ranks:
    """Ranks that compute nothing and remember in which precision they were asked to."""

    local = SimpleNamespace(engine=SimpleNamespace(device=torch.device("cpu")))

    def __init__(self) -> None:
        self.asked: list[bool] = []

    def run(self, examples: Any, *, is_bf16: bool, is_watched: bool = False) -> tuple[float, bool]:
        assert not is_watched
        self.asked.append(is_bf16)
        return 1.0, True

    def call(self, kind: str) -> None:
        assert kind == "zero"


@pytest.mark.parametrize(("bf16_speed", "is_tried"), [(0.02, False), (0.9, True), (4.0, True)])
def test_emulated_bf16_is_not_tried(
    bf16_speed: float, is_tried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn in it would be longer than ranks wait for each other."""

    def speed(device: torch.device, *, num_rows: int, dtype: torch.dtype) -> float:
        return bf16_speed if dtype is torch.bfloat16 else 1.0

    monkeypatch.setattr(node_step, "measure_flop_per_second", speed)
    ranks = Ranks()
    step = NodeStep(BASE, ranks)  # type: ignore[arg-type]
    _, reason = step.probe_precision(num_windows=2)
    assert ranks.asked == [False, False, *([True, True] if is_tried else [])]
    assert ("this CPU emulates it: fp32" in reason) is not is_tried
    assert is_tried or step.precision is Precision.FP32
