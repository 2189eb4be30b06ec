"""More shares of the CPU than are allowed before the model is known would fit no model."""

from dataclasses import replace

import pytest

from peer.parallel.machine_memory import host_memory_bytes, max_cpu_shares
from peer.parallel.memory import Setting, estimate
from peer.parallel.plan import GIB, Device, Node, plan_layout
from protos.contract.errors import MachineError
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import TINY_MODEL

SMALL = Setting(
    shape=ModelShape.from_spec(
        replace(TINY_MODEL, d_model=8, num_heads=1, num_kv_heads=1, head_dim=8, d_ff=8)
    )
)


def _node(num_shares: int, memory_bytes: int) -> Node:
    """As the trainer describes it (peer/train/workbench.py)."""
    host_bytes = estimate(plan_layout(SMALL, _cpus(1, 64 * GIB)).layout, SMALL).host_bytes
    return _cpus(num_shares, max(0, memory_bytes - host_bytes) // num_shares)


def _cpus(num_shares: int, share_bytes: int) -> Node:
    device = Device(name="cpu", memory_bytes=share_bytes, flop_per_second=50e9)
    return Node(
        devices=(device,) * num_shares,
        link_bytes_per_second=3e9,
        link_latency_seconds=2e-4,
        host_memory_bytes=64 * GIB,
    )


@pytest.mark.parametrize("memory_bytes", [2 * GIB, 8 * GIB])
def test_a_share_more_than_allowed_is_refused_for_the_smallest_model(memory_bytes: int) -> None:
    most = max_cpu_shares(memory_bytes)
    with pytest.raises(MachineError, match="GiB are missing") as refused:
        plan_layout(SMALL, _node(most + 1, memory_bytes))
    assert "lend fewer shares" in refused.value.remedy
    assert plan_layout(SMALL, _node(max(1, most // 2), memory_bytes)).layout.num_ranks >= 1


def test_shares_of_little_memory() -> None:
    assert max_cpu_shares(0) == max_cpu_shares(2**28) == 0
    assert host_memory_bytes() > 0
