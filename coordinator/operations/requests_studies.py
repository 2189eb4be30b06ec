"""What the operator asks of studies and is told: plain frozen dataclasses."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateStudyRequest:
    """See StudyDesign of coordinator/study/design.py for the fields."""

    run_id: str = ""
    """Its peers do the trials, on its dataset."""
    study_id: str = ""
    """Empty = study-1, study-2, ..."""
    num_sizes: int = 8
    min_params: float = 8e3
    max_params: float = 2.5e5
    flop: float = 1e12
    max_tokens: int = 4_000_000
    learning_rates: tuple[float, ...] = (5e-3,)
    num_repeats: int = 2
    seq_len: int = 128
    batch_tokens: int = 1_024
    warmup_steps: int = 60
    heldout_tokens: int = 0
    """0: 32,768, or all that the dataset holds out where that is less."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateStudyResponse:
    """The study as it begins."""

    study_id: str
    run_id: str
    num_trials: int
    """Of the first stage."""
    reason: str
    waiting_reason: str
    """Why its trials are not handed out yet; "" if they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRequest:
    """One study; "" means the newest."""

    study_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialStatus:
    """One trial."""

    trial_number: int
    purpose: str
    """RATE, SIZE or REPEAT."""
    state: str
    """DutyState."""
    reason: str
    num_handouts: int
    """Its fence."""
    params_n: float
    tokens: int
    flop: float
    learning_rate: float
    seed: int
    peer_id: str
    """Who holds it, or who did it."""
    peer_name: str
    loss_nats: float
    """At the end; 0 before there is a result."""
    flop_per_second: float
    """Measured while it trained; 0 before there is a result."""
    params_digest: str
    divergence: str
    """Why it was stopped early; "" if it was not. It is then no observation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyStatus:
    """One study."""

    study_id: str
    run_id: str
    dataset_id: str
    stage: str
    """RATES, SIZES, DONE or FAILED."""
    stage_reason: str
    waiting_reason: str
    """Why open trials are not handed out; "" if they are."""
    num_trials: int
    num_done: int
    num_diverged: int
    """Of the done ones."""
    trials: tuple[TrialStatus, ...]
    seed_noise_ratio: float
    """Standard deviation of ln loss between seeds, from the repeats; 0 without any."""
    create_unix_seconds: float
    finish_unix_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStudiesRequest:
    """The newest studies of one run."""

    run_id: str
    max_studies: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStudiesResponse:
    """Newest first."""

    studies: tuple[StudyStatus, ...]
