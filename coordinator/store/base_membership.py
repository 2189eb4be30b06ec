"""Transaction methods about peers, tokens, attestations, duties, evaluations and checkpoints."""

from typing import Protocol

from coordinator.store.rows_membership import (
    AttestationRow,
    CheckpointRow,
    DutyRow,
    EvaluationRow,
    PeerRow,
    StepRow,
    TokenRow,
)


class MembershipTransaction(Protocol):
    """Who takes part, and what they were asked to do beside training."""

    def insert_token(self, row: TokenRow) -> None:
        """Add a token; its id and secret must be new."""

    def update_token(self, row: TokenRow) -> None:
        """Replace a token's row."""

    def token(self, token_id: str) -> TokenRow | None:
        """One token."""

    def token_by_secret_digest(self, secret_digest: bytes) -> TokenRow | None:
        """The token with this secret."""

    def tokens(self, run_id: str) -> list[TokenRow]:
        """Tokens of a run, oldest first."""

    def insert_token_use(self, token_id: str, peer_id: str, *, use_unix_ms: int) -> None:
        """Note that a peer used a token for the first time."""

    def has_token_use(self, token_id: str, peer_id: str) -> bool:
        """True if this peer used this token before."""

    def put_peer(self, row: PeerRow) -> None:
        """Insert or replace a peer's row."""

    def peer(self, run_id: str, peer_id: str) -> PeerRow | None:
        """One peer of one run."""

    def peers(self, run_id: str) -> list[PeerRow]:
        """Peers of a run, by peer_id."""

    def peer_runs(self, peer_id: str) -> list[PeerRow]:
        """Rows of one identity over all runs, by run_id."""

    def put_attestation(self, row: AttestationRow) -> None:
        """Insert an attestation; a repeated one of the same peer and step replaces the earlier."""

    def attestations(self, run_id: str, incarnation: int, outer_step: int) -> list[AttestationRow]:
        """Attestations of one state, by peer_id."""

    def prune_attestations(
        self, run_id: str, incarnation: int, peer_id: str, *, above_outer_step: int, keep: int
    ) -> None:
        """Of a peer's attestations above an outer step, keep only the newest."""

    def all_attestations(self, run_id: str) -> list[AttestationRow]:
        """All attestations of a run, by incarnation, outer_step and peer_id."""

    def put_duty(self, row: DutyRow) -> None:
        """Insert or replace a duty's row."""

    def duty(self, duty_id: str) -> DutyRow | None:
        """One duty."""

    def duties(self, run_id: str) -> list[DutyRow]:
        """Duties of a run, oldest first."""

    def pending_duties(self, run_id: str) -> list[DutyRow]:
        """Duties that are OPEN or ASSIGNED, oldest first."""

    def delete_duty(self, duty_id: str) -> None:
        """Forget a duty."""

    def put_evaluation(self, row: EvaluationRow) -> None:
        """Insert or replace an evaluation."""

    def evaluations(self, run_id: str) -> list[EvaluationRow]:
        """Evaluations of a run, by incarnation and outer_step."""

    def put_checkpoint(self, row: CheckpointRow) -> None:
        """Insert or replace a checkpoint's row."""

    def delete_checkpoint(self, run_id: str, incarnation: int, outer_step: int) -> None:
        """Forget a checkpoint."""

    def checkpoints(self, run_id: str) -> list[CheckpointRow]:
        """Checkpoints of a run, newest stored first."""

    def num_attestations(self, run_id: str) -> int:
        """Attestations of a run."""

    def steps(self, run_id: str, *, since_unix_ms: int = 0) -> list[StepRow]:
        """Certificates in force that were stored at or after an instant, without their bytes, by
        outer_step.
        """

    def num_certificates(self, run_id: str) -> tuple[int, int]:
        """How many certificates of a run are in force, and how many are rolled back."""
