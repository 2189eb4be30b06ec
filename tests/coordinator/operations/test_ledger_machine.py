"""Hypothesis over the ledger: the real rules hold; with the fence check left out the violation is
found.
"""

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from coordinator.domain import ledger
from tests.coordinator.operations.ledger_machine import LedgerMachine

SETTINGS = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_invariants_hold_in_random_histories() -> None:
    run_state_machine_as_test(LedgerMachine, settings=SETTINGS)


def test_without_the_fence_check_a_violation_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "newer_than", lambda lease, others: [])
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            LedgerMachine, settings=settings(SETTINGS, phases=[Phase.generate])
        )
