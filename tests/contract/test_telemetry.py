"""Metric names keep the conventions, and fit a real registry."""

import re

import prometheus_client
import pytest

from protos.contract.telemetry import COORDINATOR_METRICS, PEER_METRICS, Metric, MetricKind

ALL = [("muster_peer_", metric) for metric in PEER_METRICS] + [
    ("muster_coordinator_", metric) for metric in COORDINATOR_METRICS
]


def test_names_are_distinct() -> None:
    names = [metric.name for _, metric in ALL]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("prefix", "metric"), ALL, ids=lambda value: getattr(value, "name", ""))
def test_conventions(prefix: str, metric: Metric) -> None:
    assert re.fullmatch(prefix + "[a-z][a-z0-9_]*", metric.name)
    assert metric.help_text.endswith(".")
    assert metric.name.endswith("_total") is (metric.kind is MetricKind.COUNTER)
    assert bool(metric.buckets) is (metric.kind is MetricKind.HISTOGRAM)
    assert list(metric.buckets) == sorted(metric.buckets)
    is_bounded = "peer" not in metric.labels or metric.kind is MetricKind.GAUGE
    assert is_bounded, "no peer label on counters"


def test_prometheus_takes_them_all() -> None:
    registry = prometheus_client.CollectorRegistry()
    for _, metric in ALL:
        arguments = (metric.name, metric.help_text, metric.labels)
        if metric.kind is MetricKind.COUNTER:
            prometheus_client.Counter(*arguments, registry=registry)
        elif metric.kind is MetricKind.GAUGE:
            prometheus_client.Gauge(*arguments, registry=registry)
        else:
            prometheus_client.Histogram(*arguments, registry=registry, buckets=metric.buckets)
    text = prometheus_client.generate_latest(registry).decode()
    assert all(f"# HELP {metric.name} " in text for _, metric in ALL)
