"""Rows of forecasts and studies: one frozen dataclass per table, one field per column, in the
schema's order. 0 in an instant stands for "not yet", "" in a text for "nothing".
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ForecastRow:
    """What was published after one evaluation; kept, so that it can be held against the truth."""

    run_id: str
    incarnation: int
    outer_step: int
    """Of the evaluation."""
    schedule_tokens: int
    """Of the evaluation."""
    credited_tokens: int
    """When the forecast was made."""
    budget_tokens: int
    make_unix_ms: int
    forecast_json: str
    """LiveForecast of coordinator/scaling/live.py; "" if none could be made."""
    reason: str
    """How it was made, or why none could be."""


@dataclass(frozen=True, slots=True)
class StudyRow:
    """One sweep."""

    study_id: str
    run_id: str
    """Its peers do the trials, on its dataset."""
    design_json: str
    stage: str
    """StudyStage of coordinator/study/design.py."""
    stage_reason: str
    create_unix_ms: int
    finish_unix_ms: int


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One small run; its duty (same id) says who holds it."""

    trial_id: str
    study_id: str
    trial_number: int
    purpose: str
    plan_json: str
    """TrialPlan of protos/contract/trial_plan.py."""
    flop: float
    params_n: float
    first_peer_id: str
    """Of a repeat: who did the original; somebody else does it again if there is somebody."""
    peer_id: str
    """Who did it."""
    fence: int
    """Under which the result was accepted."""
    result_json: str
    finish_unix_ms: int
