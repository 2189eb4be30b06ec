"""From a status snapshot to Prometheus samples: the newest run that is not over, or the newest one.

Claims of peers and what the coordinator counted are different metrics (their names say which).
Counters of things that the store counts per incarnation (ends of leases) are advanced by their
differences, so that they only ever rise.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from enum import StrEnum

from coordinator.metrics import Sample
from coordinator.operations.requests_admin import PeerStatus, StatusResponse
from coordinator.web.status_cache import MAX_EVENTS, StatusCache
from protos.contract import telemetry
from protos.contract.telemetry import MAX_LABELLED_PEERS, Metric

FINAL_STATES = frozenset({telemetry.RunState.FINISHED, telemetry.RunState.STOPPED})
_MAX_CATCH_UP_READS = 20


class RunSampler:
    """Remembers what earlier scrapes have counted; used by one thread at a time."""

    def __init__(
        self,
        cache: StatusCache,
        *,
        package_version: str,
        observe_round_interval: Callable[[float], None],
    ) -> None:
        self._cache = cache
        self._package_version = package_version
        self._observe_round_interval = observe_round_interval
        self._run_id = ""
        self._counted_by_lease_state: dict[str, int] = {}
        self._num_leases_counted = 0
        self._counted_incarnation = -1
        self._lease_events: Counter[str] = Counter()
        self._num_events_by_kind: Counter[str] = Counter()
        self._newest_event_id = 0
        self._newest_step_unix_seconds = 0.0

    def samples(self) -> Iterator[Sample]:
        """All samples of one scrape; none while there is no run."""
        runs = self._cache.runs().runs
        if not runs:
            return
        run = next((run for run in runs if run.state not in FINAL_STATES), runs[0])
        if run.run_id != self._run_id:
            self._run_id, self._newest_event_id, self._newest_step_unix_seconds = run.run_id, 0, 0.0
            self._counted_incarnation = -1
        status = self._cache.status(run.run_id)
        self._count_lease_events(status)
        self._count_events()
        self._observe_steps()
        yield from _run_samples(status)
        yield from _peer_samples(list(self._cache.peers(run.run_id).peers))
        for event, number in self._lease_events.items():
            yield Sample(telemetry.COORDINATOR_LEASE_EVENTS, (event,), number)
        for kind, number in self._num_events_by_kind.items():
            yield Sample(telemetry.COORDINATOR_EVENTS, (kind,), number)
        labels = (self._package_version, status.run_id, status.run_digest)
        yield Sample(telemetry.COORDINATOR_INFO, labels, 1)

    def _count_lease_events(self, status: StatusResponse) -> None:
        if status.incarnation != self._counted_incarnation:
            self._counted_incarnation = status.incarnation
            self._counted_by_lease_state, self._num_leases_counted = {}, 0
        num_leases = sum(status.leases_by_state.values())
        self._lease_events["granted"] += max(0, num_leases - self._num_leases_counted)
        self._num_leases_counted = num_leases
        for state, number in status.leases_by_state.items():
            if state != telemetry.LeaseState.ACTIVE:
                before = self._counted_by_lease_state.get(state, 0)
                self._lease_events[state.lower()] += max(0, number - before)
        self._counted_by_lease_state = dict(status.leases_by_state)

    def _count_events(self) -> None:
        for _ in range(_MAX_CATCH_UP_READS):
            found = self._cache.events(
                self._run_id, after_event_id=self._newest_event_id, max_events=MAX_EVENTS
            ).events
            fresh = [event for event in found if event.event_id > self._newest_event_id]
            if not fresh:
                return
            self._num_events_by_kind.update(event.kind for event in fresh)
            self._newest_event_id = fresh[-1].event_id

    def _observe_steps(self) -> None:
        for step in self._cache.series(self._run_id).steps:
            if step.unix_seconds <= self._newest_step_unix_seconds:
                continue
            if self._newest_step_unix_seconds:
                self._observe_round_interval(step.unix_seconds - self._newest_step_unix_seconds)
            self._newest_step_unix_seconds = step.unix_seconds


def _run_samples(status: StatusResponse) -> Iterator[Sample]:
    for metric, value in (
        (telemetry.COORDINATOR_BUDGET_TOKENS, status.budget_tokens),
        (telemetry.COORDINATOR_CREDITED_TOKENS, status.credited_tokens),
        (telemetry.COORDINATOR_LEASED_TOKENS, status.active_tokens + status.expired_tokens),
        (telemetry.COORDINATOR_ROLLED_BACK_TOKENS, status.rolled_back_tokens),
        (telemetry.COORDINATOR_GOODPUT, status.goodput_tokens_per_second),
        (telemetry.COORDINATOR_OUTER_STEP, status.outer_step),
        (telemetry.COORDINATOR_INCARNATION, status.incarnation),
        (telemetry.COORDINATOR_DIRECTIVE_NUMBER, status.directive_number),
        (telemetry.COORDINATOR_ETA_SECONDS, status.eta_seconds),
    ):
        yield Sample(metric, (), value)
    yield Sample(
        telemetry.COORDINATOR_UNCREDITED_TOKENS, ("all",), status.uncredited_trained_tokens
    )
    if status.last_evaluation is not None:
        yield Sample(telemetry.COORDINATOR_HELDOUT_LOSS_NATS, (), status.last_evaluation.loss_nats)
        yield Sample(
            telemetry.COORDINATOR_HELDOUT_BITS_PER_BYTE, (), status.last_evaluation.bits_per_byte
        )
    yield from forecast_samples(status)
    for state in telemetry.LeaseState:
        yield Sample(telemetry.COORDINATOR_LEASES, (state,), status.leases_by_state.get(state, 0))
    for peer_state in telemetry.PeerState:
        yield Sample(
            telemetry.COORDINATOR_PEERS, (peer_state,), status.peers_by_state.get(peer_state, 0)
        )
    yield from _one_hot(telemetry.COORDINATOR_RUN_STATE, telemetry.RunState, status.state)
    yield from _one_hot(
        telemetry.COORDINATOR_STATE, telemetry.CoordinatorState, status.coordinator_state
    )


def forecast_samples(status: StatusResponse) -> Iterator[Sample]:
    """Of the newest forecast, if there is one."""
    said = status.forecast.forecast
    if said is None:
        return
    bounds = (("low", said.low_nats), ("middle", said.loss_nats), ("high", said.high_nats))
    for bound, loss_nats in bounds:
        yield Sample(telemetry.COORDINATOR_FORECAST_LOSS_NATS, (bound,), loss_nats)
    yield Sample(telemetry.COORDINATOR_FORECAST_BEST_PARAMETERS, (), said.n_opt)
    yield Sample(telemetry.COORDINATOR_FORECAST_EFFICIENCY, (), said.efficiency_ratio)
    yield Sample(telemetry.COORDINATOR_RESTART_ADVISED, (), float(said.is_restart_better))
    yield Sample(telemetry.COORDINATOR_COOLDOWN_DUE, (), float(said.is_cooldown_due))


def _peer_samples(peers: list[PeerStatus]) -> Iterator[Sample]:
    live = [peer for peer in peers if peer.is_live]
    reporting = [peer for peer in live if peer.claims.loss_nats > 0]
    weights = [max(peer.claims.tokens_per_second, 1e-9) for peer in reporting]
    if reporting:
        total = sum(
            weight * peer.claims.loss_nats for weight, peer in zip(weights, reporting, strict=True)
        )
        yield Sample(telemetry.COORDINATOR_LOSS_NATS, (), total / sum(weights))
    live.sort(key=lambda peer: -peer.credited_tokens)
    for peer in live[:MAX_LABELLED_PEERS]:
        labels = (peer.peer_id, peer.name)
        yield Sample(
            telemetry.COORDINATOR_PEER_TOKENS_PER_SECOND, labels, peer.claims.tokens_per_second
        )
        yield Sample(telemetry.COORDINATOR_PEER_CREDITED_TOKENS, labels, peer.credited_tokens)
        yield Sample(telemetry.COORDINATOR_PEER_LOSS_NATS, labels, peer.claims.loss_nats)
        yield Sample(
            telemetry.COORDINATOR_PEER_AVERAGING_BYTES_PER_SECOND,
            labels,
            peer.claims.averaging_bytes_per_second,
        )
    for phase in telemetry.ATTEMPT_PHASES:
        name = phase.value.lower()
        longest_seconds = max((getattr(p.claims, f"{name}_seconds") for p in live), default=0.0)
        yield Sample(telemetry.COORDINATOR_PEER_ROUND_SECONDS, (name,), longest_seconds)


def _one_hot(metric: Metric, states: type[StrEnum], current: str) -> Iterator[Sample]:
    for state in states:
        yield Sample(metric, (state.value,), 1 if state.value == current else 0)
