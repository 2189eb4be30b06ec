"""SQLite: forecasts, studies, trials (guarantees: base_studies.py)."""

import sqlite3

from coordinator.store.rows_studies import ForecastRow, StudyRow, TrialRow
from coordinator.store.sqlite_table import Table

FORECASTS = Table("forecasts", ForecastRow, key=("run_id", "incarnation", "outer_step"))
STUDIES = Table("studies", StudyRow, key=("study_id",))
TRIALS = Table("trials", TrialRow, key=("trial_id",))


class SqliteStudies:
    """Mixin of SqliteTransaction."""

    _connection: sqlite3.Connection

    def put_forecast(self, row: ForecastRow) -> None:
        FORECASTS.upsert(self._connection, row)

    def forecasts(self, run_id: str) -> list[ForecastRow]:
        condition = "run_id = ? ORDER BY make_unix_ms, incarnation, outer_step"
        return FORECASTS.where(self._connection, condition, run_id)

    def newest_forecast(self, run_id: str) -> ForecastRow | None:
        condition = "run_id = ? ORDER BY make_unix_ms DESC, incarnation DESC, outer_step DESC"
        found = FORECASTS.where(self._connection, f"{condition} LIMIT 1", run_id)
        return found[0] if found else None

    def put_study(self, row: StudyRow) -> None:
        STUDIES.upsert(self._connection, row)

    def study(self, study_id: str) -> StudyRow | None:
        return STUDIES.one(self._connection, study_id)

    def studies(self) -> list[StudyRow]:
        return STUDIES.where(self._connection, "1 ORDER BY create_unix_ms, study_id")

    def put_trial(self, row: TrialRow) -> None:
        TRIALS.upsert(self._connection, row)

    def trial(self, trial_id: str) -> TrialRow | None:
        return TRIALS.one(self._connection, trial_id)

    def trials(self, study_id: str) -> list[TrialRow]:
        return TRIALS.where(self._connection, "study_id = ? ORDER BY trial_number", study_id)
