"""One look at each run per second at most, shared by the page, the JSON API and the scraper,
whatever their number.

Looks are read-only transactions in the web server's threads, beside the writer. Answers are kept as
they are (frozen dataclasses); a run that nobody asks about costs nothing.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from coordinator.operations.admin import list_runs
from coordinator.operations.requests_admin import (
    EventsRequest,
    EventsResponse,
    ListRunsRequest,
    ListRunsResponse,
    PeersRequest,
    PeersResponse,
    SeriesRequest,
    SeriesResponse,
    StatusRequest,
    StatusResponse,
)
from coordinator.operations.requests_studies import RunStudiesRequest, StudyRequest, StudyStatus
from coordinator.operations.status import events, peers, series, status
from coordinator.operations.studies import run_studies, study_observations
from coordinator.operations.writer import Writer
from coordinator.scaling.observations import Observations
from coordinator.web.study_view import StudyViews, plain_views
from protos.contract.errors import UsageError

LOOK_SECONDS = 1.0
MAX_POINTS = 2_000
MAX_EVENTS = 500
_MAX_KEPT = 64
_Response = TypeVar("_Response")


class StatusCache:
    """Thread-safe; each look is made once however many wait for it."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._lock = threading.Lock()
        self._views = StudyViews()
        self._kept_by_key: dict[tuple[Any, ...], tuple[float, Any]] = {}

    def runs(self) -> ListRunsResponse:
        """All runs, newest first."""
        return self._look(("runs",), lambda: self._writer.read(list_runs, ListRunsRequest()))

    def status(self, run_id: str) -> StatusResponse:
        """Head of one run. Raises RefusedError (UNKNOWN_RUN)."""
        request = StatusRequest(run_id=run_id)
        return self._look(("status", run_id), lambda: self._writer.read(status, request))

    def peers(self, run_id: str) -> PeersResponse:
        """Members of one run."""
        return self._look(
            ("peers", run_id), lambda: self._writer.read(peers, PeersRequest(run_id=run_id))
        )

    def series(self, run_id: str) -> SeriesResponse:
        """Curves of one run, decimated."""
        request = SeriesRequest(run_id=run_id, max_points=MAX_POINTS)
        return self._look(("series", run_id), lambda: self._writer.read(series, request))

    def studies(self, run_id: str) -> dict[str, Any]:
        """Studies of one run with what was measured and the law fitted to it, as plain data."""
        found = self._look(("studies", run_id), lambda: self._read_studies(run_id))
        return plain_views(tuple(self._views.view(study, table) for study, table in found))

    def _read_studies(self, run_id: str) -> list[tuple[StudyStatus, Observations | UsageError]]:
        found: list[tuple[StudyStatus, Observations | UsageError]] = []
        for study in self._writer.read(run_studies, RunStudiesRequest(run_id=run_id)).studies:
            request = StudyRequest(study_id=study.study_id)
            try:
                found.append((study, self._writer.read(study_observations, request)))
            except UsageError as error:
                found.append((study, error))
        return found

    def events(self, run_id: str, *, after_event_id: int, max_events: int) -> EventsResponse:
        """Part of the event log."""
        request = EventsRequest(
            run_id=run_id, after_event_id=after_event_id, max_events=min(max_events, MAX_EVENTS)
        )
        key = ("events", run_id, after_event_id, request.max_events)
        return self._look(key, lambda: self._writer.read(events, request))

    def _look(self, key: tuple[Any, ...], read: Callable[[], _Response]) -> _Response:
        with self._lock:
            now_monotonic_seconds = time.monotonic()
            kept = self._kept_by_key.get(key)
            if kept is not None and now_monotonic_seconds - kept[0] < LOOK_SECONDS:
                found: _Response = kept[1]
                return found
            response = read()
            if len(self._kept_by_key) >= _MAX_KEPT:
                self._kept_by_key.clear()
            self._kept_by_key[key] = (now_monotonic_seconds, response)
            return response
