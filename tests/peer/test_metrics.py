"""A peer's registry holds the contract's metrics and nothing else, and is served on loopback."""

import urllib.request

import pytest
from prometheus_client import generate_latest

from peer.metrics import PeerMetrics
from protos.contract import telemetry
from protos.contract.errors import ErrorCode, MachineError
from protos.contract.telemetry import PEER_METRICS, SessionState


def test_every_metric_of_the_contract_is_exposed() -> None:
    text = generate_latest(PeerMetrics().registry).decode()
    for metric in PEER_METRICS:
        assert f"# HELP {metric.name}" in text, metric.name


def test_one_state_at_a_time() -> None:
    metrics = PeerMetrics()
    metrics.show_state(SessionState.SYNCING)
    metrics.show_state(SessionState.TRAINING)
    text = generate_latest(metrics.registry).decode()
    lines = [line for line in text.splitlines() if line.startswith("muster_peer_session_state{")]
    assert [line for line in lines if line.endswith(" 1.0")] == [
        'muster_peer_session_state{state="TRAINING"} 1.0'
    ]
    assert len(lines) == len(SessionState)


def test_served_on_a_port_of_its_own_and_a_taken_one_is_refused() -> None:
    metrics, other = PeerMetrics(), PeerMetrics()
    metrics.add(telemetry.PEER_TRAINED_TOKENS, 512)
    port = metrics.serve(port=0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert b"muster_peer_trained_tokens_total 512.0" in answer.read()
        with pytest.raises(MachineError) as caught:
            other.serve(port=port)
        assert caught.value.code is ErrorCode.PORT_IN_USE
    finally:
        metrics.close()
