"""The state of a run and its reason, by table."""

from dataclasses import replace
from typing import Any

import pytest

from coordinator.domain.run_state import FinalDuty, RunFacts, decide_run_state
from protos.contract.telemetry import RunState

FACTS = RunFacts(
    previous=RunState.RUNNING,
    previous_reason="before",
    incarnation=1,
    bootstrap_reason="waits for peers",
    is_paused=False,
    pause_reason="",
    num_live_peers=3,
    is_recovering=False,
    stall_reason="",
    outer_step=7,
    credited_tokens=50,
    budget_tokens=100,
)
OPEN = FinalDuty(is_done=False, is_given_up=False, reason="final evaluation is OPEN")
DONE = FinalDuty(is_done=True, is_given_up=False, reason="final evaluation is DONE")
GIVEN_UP = FinalDuty(is_done=False, is_given_up=True, reason="final checkpoint is FAILED")


@pytest.mark.parametrize(
    ("changes", "state", "reason"),
    [
        ({}, RunState.RUNNING, "3 live peers"),
        ({"incarnation": 0}, RunState.WAITING_FOR_PEERS, "waits for peers"),
        ({"is_paused": True, "pause_reason": "paused: why"}, RunState.PAUSED, "paused: why"),
        ({"num_live_peers": 0}, RunState.STALLED, "no live peer; 50 of 100"),
        ({"stall_reason": "no quorum"}, RunState.STALLED, "no quorum"),
        ({"num_live_peers": 0, "is_recovering": True}, RunState.RUNNING, "before"),
        ({"previous": RunState.STOPPED}, RunState.STOPPED, "before"),
        ({"previous": RunState.FINISHED, "num_live_peers": 0}, RunState.FINISHED, "before"),
        ({"credited_tokens": 100}, RunState.RUNNING, "waits: final duties"),
        ({"credited_tokens": 100, "final_duties": (DONE, OPEN)}, RunState.RUNNING, "is OPEN"),
        ({"credited_tokens": 100, "final_duties": (DONE, DONE)}, RunState.FINISHED, "is DONE"),
        ({"credited_tokens": 100, "final_duties": (DONE, GIVEN_UP)}, RunState.FINISHED, "FAILED"),
        (
            {"credited_tokens": 100, "final_duties": (OPEN,), "num_live_peers": 0},
            RunState.FINISHED,
            "no member is left",
        ),
        (
            {
                "credited_tokens": 100,
                "final_duties": (OPEN,),
                "num_live_peers": 0,
                "is_recovering": True,
            },
            RunState.RUNNING,
            "is OPEN",
        ),
    ],
)
def test_state_and_reason(changes: dict[str, Any], state: RunState, reason: str) -> None:
    verdict = decide_run_state(replace(FACTS, **changes))
    assert verdict.state is state
    assert reason in verdict.reason
