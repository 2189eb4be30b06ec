"""What a peer exposes: one registry per daemon, built from the contract's list and nothing else.

Trainer and swarm process report to the daemon over their channels; it alone has metrics. The server
is loopback only and runs in a thread of its own, so that a slow scrape cannot delay a heartbeat;
rendering 15 metrics takes about a millisecond.
"""

import errno
from collections.abc import Mapping
from types import MappingProxyType
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.registry import Collector

from protos.contract.errors import ErrorCode, MachineError
from protos.contract.telemetry import PEER_METRICS, PEER_STATE, Metric, MetricKind, SessionState

_HOST = "127.0.0.1"
_NO_LABELS: Mapping[str, str] = MappingProxyType({})


class PeerMetrics:
    """All metrics of one daemon, set by the contract's declarations."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._by_name: dict[str, Collector] = {
            metric.name: _build(metric, self.registry) for metric in PEER_METRICS
        }
        self._server: WSGIServer | None = None

    def set(self, metric: Metric, value: float, labels: Mapping[str, str] = _NO_LABELS) -> None:
        """Set a gauge."""
        gauge = self._by_name[metric.name]
        assert isinstance(gauge, Gauge)
        (gauge.labels(**labels) if labels else gauge).set(value)

    def add(self, metric: Metric, amount: float, labels: Mapping[str, str] = _NO_LABELS) -> None:
        """Raise a counter."""
        counter = self._by_name[metric.name]
        assert isinstance(counter, Counter)
        (counter.labels(**labels) if labels else counter).inc(amount)

    def observe(self, metric: Metric, value: float, labels: Mapping[str, str] = _NO_LABELS) -> None:
        """Add to a histogram."""
        histogram = self._by_name[metric.name]
        assert isinstance(histogram, Histogram)
        (histogram.labels(**labels) if labels else histogram).observe(value)

    def show_state(self, state: SessionState) -> None:
        """1 for this state, 0 for the others."""
        for member in SessionState:
            self.set(PEER_STATE, float(member is state), {"state": member.value})

    def serve(self, *, port: int) -> int:
        """Serve /metrics on loopback; returns the port, chosen by the system for 0. Raises
        MachineError.
        """
        try:
            self._server, _ = start_http_server(port, addr=_HOST, registry=self.registry)
        except OSError as error:
            code = ErrorCode.PORT_IN_USE if error.errno == errno.EADDRINUSE else None
            raise MachineError(
                f"cannot serve metrics on {_HOST}:{port}: {error.strerror}",
                allowed="a free port that this user may open",
                remedy="choose another with --metrics-port, or 0 to let the system choose",
                code=code,
            ) from error
        return int(self._server.server_port)

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


def _build(metric: Metric, registry: CollectorRegistry) -> Collector:
    if metric.kind is MetricKind.HISTOGRAM:
        return Histogram(
            metric.name, metric.help_text, metric.labels, registry=registry, buckets=metric.buckets
        )
    make = Counter if metric.kind is MetricKind.COUNTER else Gauge
    return make(metric.name, metric.help_text, metric.labels, registry=registry)
