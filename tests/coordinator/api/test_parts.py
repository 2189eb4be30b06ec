"""Parts of the border that need no server: plain form, rate limits, nonces, the table of admin
operations.
"""

import math

import pytest

from coordinator.api.admin_servicer import ADMIN_FUNCTIONS, ADMIN_OPERATIONS, admin_operation
from coordinator.api.auth import MAX_NONCES, NONCE_LIFE_SECONDS, NonceBook
from coordinator.api.rate_limit import RateLimiter
from coordinator.api.wire import checked_text, duration, timestamp
from coordinator.operations.catalogue import OPERATIONS
from coordinator.operations.plain import from_plain, plain_from_response
from coordinator.operations.requests import Capabilities, Claims, FinishUploadResponse, JoinRequest
from coordinator.operations.requests_admin import CreateRunRequest, SeriesResponse, StepPoint
from protos.contract.errors import ErrorCode, RefusedError, UnavailableError, UsageError


def test_admin_functions_are_the_catalogues() -> None:
    assert set(ADMIN_FUNCTIONS) == set(ADMIN_OPERATIONS)
    for operation in OPERATIONS:
        if operation.is_admin:
            function = ADMIN_FUNCTIONS[operation.name]
            assert function.__module__ == f"coordinator.operations.{operation.module}"
            assert function.__name__ == operation.name
    with pytest.raises(UsageError) as caught:
        admin_operation("join")
    assert caught.value.code is ErrorCode.UNKNOWN_OPERATION


@pytest.mark.parametrize(
    "value",
    [
        CreateRunRequest(
            run_id="a", spec=b"\x00\xff", dataset_dir="d", manifest=b"{}", min_peers=2
        ),
        JoinRequest(
            run_id="a",
            token_secret=b"1",
            nonce=b"2",
            public_key=b"3",
            signature=b"4",
            p2p_public_key=b"5",
            p2p_signature=b"6",
            name="n",
            protocol_version=1,
            capabilities=Capabilities(addresses=("x", "y"), tokens_per_second=1.5),
        ),
        FinishUploadResponse(is_accepted=True, reason="", remove_paths=("p",)),
        Claims(loss_nats=2.0),
    ],
)
def test_plain_form_goes_both_ways(value: object) -> None:
    assert from_plain(type(value), plain_from_response(value)) == value


@pytest.mark.parametrize(
    "plain",
    [
        [],
        {},
        {"run_id": "a"},
        {"run_id": 1, "spec": "", "dataset_dir": "", "manifest": ""},
        {"run_id": "a", "spec": "xy", "dataset_dir": "", "manifest": ""},
        {"run_id": "a", "spec": "", "dataset_dir": "", "manifest": "", "sed": 1},
        {"run_id": "a", "spec": "", "dataset_dir": "", "manifest": "", "min_peers": True},
    ],
)
def test_bad_arguments_are_refused(plain: object) -> None:
    with pytest.raises(UsageError):
        from_plain(CreateRunRequest, plain)


def test_numbers_that_are_not_finite_become_null() -> None:
    point = StepPoint(
        incarnation=1,
        outer_step=1,
        unix_seconds=math.inf,
        schedule_tokens=1,
        credited_tokens=1,
        step_tokens=1,
        loss_nats=math.nan,
        num_members=1,
        num_contributors=1,
        attempt=0,
    )
    plain = plain_from_response(SeriesResponse(run_id="a", steps=(point,), evaluations=()))
    assert plain["steps"][0]["loss_nats"] is None
    assert plain["steps"][0]["unix_seconds"] is None


def test_rate_limit_refills_with_time() -> None:
    limiter = RateLimiter(calls_per_second=2.0, burst_calls=4.0)
    for _ in range(4):
        limiter.take("a", now_monotonic_seconds=10.0)
    with pytest.raises(UnavailableError) as caught:
        limiter.take("a", now_monotonic_seconds=10.25)
    assert caught.value.code is ErrorCode.RATE_LIMITED
    limiter.take("b", now_monotonic_seconds=10.25)
    limiter.take("a", now_monotonic_seconds=10.5)
    with pytest.raises(UnavailableError):
        limiter.take("a", now_monotonic_seconds=10.6)


def test_nonces_serve_once_and_not_for_ever() -> None:
    now_unix_seconds = 1000.0
    book = NonceBook(clock=lambda: now_unix_seconds)
    first, second = book.issue(), book.issue()
    assert first != second and len(first) == 32
    book.use(first)
    for nonce in (first, bytes(32), b""):
        with pytest.raises(RefusedError):
            book.use(nonce)
    now_unix_seconds += NONCE_LIFE_SECONDS
    with pytest.raises(RefusedError):
        book.use(second)
    for _ in range(MAX_NONCES):
        book.issue()
    with pytest.raises(UnavailableError):
        book.issue()


def test_texts_and_times() -> None:
    assert checked_text("a\nb\x1b", name="reason") == "a\\nb\\x1b"
    with pytest.raises(UsageError) as caught:
        checked_text("x" * 1000, name="reason")
    assert caught.value.code is ErrorCode.TOO_LARGE
    assert timestamp(1.75).ToNanoseconds() == 1_750_000_000
    assert duration(0.25).ToNanoseconds() == 250_000_000
