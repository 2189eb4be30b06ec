"""Runs as the operator makes them: rounding, refusals, the catalogue of operations."""

import importlib
import inspect
import json
from typing import Any

import pytest

from coordinator.operations import admin, tokens
from coordinator.operations.catalogue import OPERATIONS
from coordinator.operations.requests_admin import (
    CreateRunRequest,
    CreateTokenRequest,
    EvictPeerRequest,
    ListRunsRequest,
    RunRequest,
)
from protos.contract.digest import canonical_json
from protos.contract.errors import ErrorCode, MusterError, UsageError
from protos.contract.telemetry import RunState
from tests.coordinator.operations.ledger_world import SEQ_LEN, build_manifest
from tests.coordinator.operations.swarm_world import RUN_ID, SwarmWorld


def create(world: SwarmWorld, *, run_id: str = "", min_peers: int = 1, **changes: Any) -> Any:
    plain = json.loads(world.context.run_data_by_run[RUN_ID].spec.to_wire()) | changes
    request = CreateRunRequest(
        run_id=run_id,
        spec=canonical_json(plain),
        dataset_dir="datasets/test",
        manifest=build_manifest((16, 16, 16, 16, 16)).to_bytes(),
        min_peers=min_peers,
    )
    return world.do(admin.create_run, request)


def test_the_budget_is_rounded_down_to_whole_windows() -> None:
    world = SwarmWorld.create()
    made = create(world, budget_tokens=10 * SEQ_LEN + 3, seed=7)
    assert made.budget_tokens == 10 * SEQ_LEN
    assert "rounded down from 43" in made.reason
    assert made.run_id == f"run-{made.run_digest[:8]}"
    runs = world.do(admin.list_runs, ListRunsRequest()).runs
    assert {run.run_id for run in runs} == {made.run_id, RUN_ID}


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"budget_tokens": 81 * 4 * SEQ_LEN}, ErrorCode.INVALID_ARGUMENT, "max_data_passes = 4"),
        ({"budget_tokens": 1}, ErrorCode.INVALID_ARGUMENT, "budget_tokens"),
        ({"budget_tokens": "x"}, ErrorCode.INVALID_ARGUMENT, "budget_tokens"),
        ({"objective": {"name": "answers"}}, ErrorCode.INVALID_ARGUMENT, "running text"),
        ({"sed": 1}, ErrorCode.INVALID_ARGUMENT, "did you mean 'seed'"),
        ({"run_id": RUN_ID}, ErrorCode.ALREADY_EXISTS, "exists already"),
        ({"run_id": "Bad Id"}, ErrorCode.INVALID_ARGUMENT, "lower-case"),
        ({"min_peers": 0}, ErrorCode.INVALID_ARGUMENT, "at least 1"),
        (
            {"data": {"dataset_id": "0" * 64}},
            ErrorCode.DIGEST_MISMATCH,
            "names dataset 000000000000",
        ),
    ],
)
def test_refusals_name_what_was_found(changes: dict[str, Any], code: ErrorCode, words: str) -> None:
    world = SwarmWorld.create()
    with pytest.raises(MusterError) as caught:
        create(world, **changes)
    assert caught.value.code is code
    assert words in str(caught.value)
    assert len(world.do(admin.list_runs, ListRunsRequest()).runs) == 1


def test_what_changes_a_run_is_told_which_if_several_are_not_over() -> None:
    world = SwarmWorld.create()
    assert world.do(admin.pause_run, RunRequest()).run_id == RUN_ID
    other = create(world, budget_tokens=10 * SEQ_LEN, seed=7).run_id
    requests = [
        (admin.pause_run, RunRequest()),
        (admin.resume_run, RunRequest()),
        (admin.stop_run, RunRequest()),
        (admin.evict_peer, EvictPeerRequest(peer_id="a")),
        (tokens.create_token, CreateTokenRequest()),
    ]
    for operation, request in requests:
        with pytest.raises(UsageError, match=f"2 runs are not over: .*{other}"):
            world.do(operation, request)
    assert world.do(admin.stop_run, RunRequest(run_id=other)).state == RunState.STOPPED
    assert world.do(admin.stop_run, RunRequest()).run_id == RUN_ID


def test_the_catalogue_names_functions_that_exist() -> None:
    for operation in OPERATIONS:
        module = importlib.import_module(f"coordinator.operations.{operation.module}")
        signature = inspect.signature(getattr(module, operation.name))
        request = list(signature.parameters.values())[1]
        assert request.annotation is operation.request, operation.name
        assert signature.return_annotation is operation.response, operation.name
