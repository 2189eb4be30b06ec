"""Transaction methods about forecasts, studies and trials."""

from typing import Protocol

from coordinator.store.rows_studies import ForecastRow, StudyRow, TrialRow


class StudiesTransaction(Protocol):
    """What small runs and running ones teach."""

    def put_forecast(self, row: ForecastRow) -> None:
        """Insert or replace the forecast after one evaluation."""

    def forecasts(self, run_id: str) -> list[ForecastRow]:
        """Forecasts of a run in the order in which they were made."""

    def newest_forecast(self, run_id: str) -> ForecastRow | None:
        """The last of them."""

    def put_study(self, row: StudyRow) -> None:
        """Insert or replace a study's row."""

    def study(self, study_id: str) -> StudyRow | None:
        """One study."""

    def studies(self) -> list[StudyRow]:
        """All studies, oldest first."""

    def put_trial(self, row: TrialRow) -> None:
        """Insert or replace a trial's row."""

    def trial(self, trial_id: str) -> TrialRow | None:
        """One trial."""

    def trials(self, study_id: str) -> list[TrialRow]:
        """Trials of a study by number."""
