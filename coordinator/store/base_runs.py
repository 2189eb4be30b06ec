"""Transaction methods about runs: spec, incarnations, directives, events, request ids, meta."""

from typing import Protocol

from coordinator.store.rows import DirectiveRow, EventRow, IncarnationRow, RequestRow, RunRow


class RunsTransaction(Protocol):
    """Runs and what belongs to the deployment as a whole."""

    def insert_run(self, row: RunRow) -> None:
        """Add a run; its id must be new."""

    def update_run(self, row: RunRow) -> None:
        """Replace the run's row."""

    def run(self, run_id: str) -> RunRow | None:
        """The run, or None."""

    def runs(self) -> list[RunRow]:
        """All runs, oldest first."""

    def insert_incarnation(self, row: IncarnationRow) -> None:
        """Add a signed incarnation record; its number must be new."""

    def incarnation(self, run_id: str, incarnation: int) -> IncarnationRow | None:
        """The record of one incarnation."""

    def incarnations(self, run_id: str) -> list[IncarnationRow]:
        """All records of a run, oldest first."""

    def insert_directive(self, row: DirectiveRow) -> None:
        """Add a signed directive; its number must be new."""

    def directive(self, run_id: str, directive_number: int) -> DirectiveRow | None:
        """One directive."""

    def directives(self, run_id: str) -> list[DirectiveRow]:
        """All directives of a run, oldest first."""

    def insert_event(
        self, *, run_id: str, unix_ms: int, kind: str, peer_id: str, text: str
    ) -> None:
        """Append one line to the event log; `run_id` and `peer_id` may be empty."""

    def events(
        self, run_id: str, *, after_event_id: int = 0, num_events: int = 200
    ) -> list[EventRow]:
        """The oldest `num_events` lines after an id, oldest first."""

    def newest_events(self, run_id: str, *, num_events: int = 200) -> list[EventRow]:
        """The newest `num_events` lines, oldest first."""

    def insert_request(self, row: RequestRow) -> None:
        """Remember the answer to a request id."""

    def request(self, caller: str, request_id: str) -> RequestRow | None:
        """The remembered answer."""

    def prune_requests(self, *, before_unix_ms: int, num_requests: int) -> int:
        """Forget at most `num_requests` answers stored before an instant; returns how many."""

    def meta(self, name: str) -> str:
        """A value of the deployment, "" if it was never set."""

    def set_meta(self, name: str, value: str) -> None:
        """Set a value of the deployment."""
