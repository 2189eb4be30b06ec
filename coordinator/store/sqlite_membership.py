"""SQLite: peers, tokens, attestations, duties, evaluations, checkpoints (guarantees:
base_membership.py).
"""

import sqlite3

from coordinator.store.rows_membership import (
    AttestationRow,
    CheckpointRow,
    DutyRow,
    EvaluationRow,
    PeerRow,
    StepRow,
    TokenRow,
)
from coordinator.store.sqlite_kept import KeptRows
from coordinator.store.sqlite_table import Table, run_sql

TOKENS = Table("tokens", TokenRow, key=("token_id",))
PEERS = Table("peers", PeerRow, key=("run_id", "peer_id"))
ATTESTATIONS = Table(
    "attestations", AttestationRow, key=("run_id", "incarnation", "outer_step", "peer_id")
)
DUTIES = Table("duties", DutyRow, key=("duty_id",))
EVALUATIONS = Table(
    "evaluations", EvaluationRow, key=("run_id", "incarnation", "outer_step", "duty_id")
)
CHECKPOINTS = Table("checkpoints", CheckpointRow, key=("run_id", "incarnation", "outer_step"))
STEPS = Table("certificates", StepRow, key=("run_id", "incarnation", "outer_step"))
"""Read only: the certificates' rows are written by sqlite_ledger.py."""


class SqliteMembership:
    """Mixin of SqliteTransaction."""

    _connection: sqlite3.Connection
    _kept: KeptRows

    def insert_token(self, row: TokenRow) -> None:
        TOKENS.insert(self._connection, row)

    def update_token(self, row: TokenRow) -> None:
        TOKENS.upsert(self._connection, row)

    def token(self, token_id: str) -> TokenRow | None:
        return TOKENS.one(self._connection, token_id)

    def token_by_secret_digest(self, secret_digest: bytes) -> TokenRow | None:
        found = TOKENS.where(self._connection, "secret_digest = ?", secret_digest)
        return found[0] if found else None

    def tokens(self, run_id: str) -> list[TokenRow]:
        return TOKENS.where(
            self._connection, "run_id = ? ORDER BY create_unix_ms, token_id", run_id
        )

    def insert_token_use(self, token_id: str, peer_id: str, *, use_unix_ms: int) -> None:
        run_sql(
            self._connection,
            "INSERT INTO token_uses (token_id, peer_id, use_unix_ms) VALUES (?, ?, ?)",
            (token_id, peer_id, use_unix_ms),
        )

    def has_token_use(self, token_id: str, peer_id: str) -> bool:
        sql = "SELECT 1 FROM token_uses WHERE token_id = ? AND peer_id = ?"
        return run_sql(self._connection, sql, (token_id, peer_id)).fetchone() is not None

    def put_peer(self, row: PeerRow) -> None:
        if self._kept.peer_by_key.get((row.run_id, row.peer_id)) is None:
            PEERS.upsert(self._connection, row)
        else:
            PEERS.update(self._connection, row)
        self._kept.keep_peer(row)

    def peer(self, run_id: str, peer_id: str) -> PeerRow | None:
        row = self._kept.peer_by_key.get((run_id, peer_id))
        if row is None:
            row = PEERS.one(self._connection, run_id, peer_id)
            if row is not None:
                self._kept.keep_peer(row)
        return row

    def peers(self, run_id: str) -> list[PeerRow]:
        kept = self._kept.peers_by_run.get(run_id)
        if kept is not None:
            return [kept[peer_id] for peer_id in sorted(kept)]
        rows = PEERS.where(self._connection, "run_id = ? ORDER BY peer_id", run_id)
        self._kept.keep_peers(run_id, rows)
        return rows

    def peer_runs(self, peer_id: str) -> list[PeerRow]:
        return PEERS.where(self._connection, "peer_id = ? ORDER BY run_id", peer_id)

    def put_attestation(self, row: AttestationRow) -> None:
        ATTESTATIONS.upsert(self._connection, row)

    def attestations(self, run_id: str, incarnation: int, outer_step: int) -> list[AttestationRow]:
        condition = "run_id = ? AND incarnation = ? AND outer_step = ? ORDER BY peer_id"
        return ATTESTATIONS.where(self._connection, condition, run_id, incarnation, outer_step)

    def prune_attestations(
        self, run_id: str, incarnation: int, peer_id: str, *, above_outer_step: int, keep: int
    ) -> None:
        condition = "run_id = ? AND incarnation = ? AND peer_id = ? AND outer_step > ?"
        values = (run_id, incarnation, peer_id, above_outer_step)
        run_sql(
            self._connection,
            f"DELETE FROM attestations WHERE {condition} AND outer_step NOT IN (SELECT outer_step"
            f" FROM attestations WHERE {condition} ORDER BY outer_step DESC LIMIT ?)",
            (*values, *values, keep),
        )

    def all_attestations(self, run_id: str) -> list[AttestationRow]:
        condition = "run_id = ? ORDER BY incarnation, outer_step, peer_id"
        return ATTESTATIONS.where(self._connection, condition, run_id)

    def put_duty(self, row: DutyRow) -> None:
        DUTIES.upsert(self._connection, row)

    def duty(self, duty_id: str) -> DutyRow | None:
        return DUTIES.one(self._connection, duty_id)

    def duties(self, run_id: str) -> list[DutyRow]:
        return DUTIES.where(self._connection, "run_id = ? ORDER BY create_unix_ms, duty_id", run_id)

    def pending_duties(self, run_id: str) -> list[DutyRow]:
        condition = "run_id = ? AND state IN ('OPEN', 'ASSIGNED') ORDER BY create_unix_ms, duty_id"
        return DUTIES.where(self._connection, condition, run_id)

    def delete_duty(self, duty_id: str) -> None:
        run_sql(self._connection, "DELETE FROM duties WHERE duty_id = ?", (duty_id,))

    def put_evaluation(self, row: EvaluationRow) -> None:
        EVALUATIONS.upsert(self._connection, row)

    def evaluations(self, run_id: str) -> list[EvaluationRow]:
        condition = "run_id = ? ORDER BY incarnation, outer_step, duty_id"
        return EVALUATIONS.where(self._connection, condition, run_id)

    def put_checkpoint(self, row: CheckpointRow) -> None:
        CHECKPOINTS.upsert(self._connection, row)

    def delete_checkpoint(self, run_id: str, incarnation: int, outer_step: int) -> None:
        sql = "DELETE FROM checkpoints WHERE run_id = ? AND incarnation = ? AND outer_step = ?"
        run_sql(self._connection, sql, (run_id, incarnation, outer_step))

    def checkpoints(self, run_id: str) -> list[CheckpointRow]:
        condition = "run_id = ? ORDER BY store_unix_ms DESC, incarnation DESC, outer_step DESC"
        return CHECKPOINTS.where(self._connection, condition, run_id)

    def num_attestations(self, run_id: str) -> int:
        sql = "SELECT COUNT(*) FROM attestations WHERE run_id = ?"
        return int(run_sql(self._connection, sql, (run_id,)).fetchone()[0])

    def steps(self, run_id: str, *, since_unix_ms: int = 0) -> list[StepRow]:
        condition = "run_id = ? AND rolled_back_by = 0 AND store_unix_ms >= ? ORDER BY outer_step"
        return STEPS.where(self._connection, condition, run_id, since_unix_ms)

    def num_certificates(self, run_id: str) -> tuple[int, int]:
        sql = (
            "SELECT COUNT(*), COALESCE(SUM(rolled_back_by = 0), 0) FROM certificates WHERE run_id "
            "= ?"
        )
        total, live = run_sql(self._connection, sql, (run_id,)).fetchone()
        return int(live), int(total) - int(live)
