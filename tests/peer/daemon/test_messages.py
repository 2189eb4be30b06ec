"""What a trainer says of its layers is served on the peer's own endpoint."""

import urllib.request
from typing import Any

from peer.daemon.core import Core
from peer.daemon.messages import MessageDesk
from peer.daemon.reports import SessionNumbers
from peer.metrics import PeerMetrics
from peer.session_events import ChildName


def test_layers_are_metrics_that_can_be_scraped() -> None:
    core = Core(
        numbers=SessionNumbers(peer_id="me", name="me"),
        metrics=PeerMetrics(),
        report=lambda _: None,
        on_drain=lambda _: None,
    )
    others: Any = None
    desk = MessageDesk(
        core, outbox=others, coordinator=others, duties=others, send=others, start_task=others,
        note_failure=others, watches={},
    )  # fmt: skip
    kinds = ("activation_rms", "activation_max", "gradient_rms", "gradient_max")
    layers = [
        {"layer": layer} | {kind: begin + index for index, kind in enumerate(kinds)}
        for layer, begin in (("embedding", 0.5), ("1", 10.5))
    ]
    desk.take(ChildName.TRAINER, {"kind": "layer_stats", "layers": layers})
    port = core.metrics.serve(port=0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
    finally:
        core.metrics.close()
    name = "muster_peer_layer"
    assert name + '_activation{layer="embedding",statistic="max"} 1.5' in lines
    assert name + '_gradient{layer="1",statistic="rms"} 12.5' in lines
