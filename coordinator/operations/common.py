"""What every operation shares: its context, how time is written, and the same answer to the same
request id.

An operation is a plain function `(tx, request, *, context, now_unix_seconds) -> response` over
frozen dataclasses, run by the writer thread (writer.py) inside a savepoint; it raises MusterError
to refuse, and then leaves no trace.
"""

import hashlib
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from coordinator.domain.policy import SwarmPolicy
from coordinator.store.base import Transaction
from coordinator.store.rows import BookRow, RequestRow, RunRow
from protos.contract.chunk_format import Manifest
from protos.contract.errors import CorruptDataError, ErrorCode, RefusedError, UsageError
from protos.contract.run_spec import RunSpec
from protos.contract.schedule_order import ScheduleOrder
from protos.contract.signing import SigningKey
from protos.muster.v1 import common_pb2

Answer = TypeVar("Answer")

_CACHED_DIRECTIVES = 16

REQUEST_MEMORY_SECONDS = 600.0
"""How long the answer to a request id is given again; a client gives up long before."""


def unix_ms(unix_seconds: float) -> int:
    """Instant in the store's form."""
    return int(unix_seconds * 1000)


@dataclass(frozen=True, slots=True)
class RunData:
    """What a run's spec and dataset imply; built once per run and process."""

    spec: RunSpec
    manifest: Manifest
    order: ScheduleOrder


@dataclass(frozen=True, slots=True)
class DirectiveData:
    """A parsed directive, not to be changed, and what is asked of its roster at every request."""

    directive: common_pb2.Directive
    round_tokens_by_peer: dict[str, int]
    total_round_tokens: int
    num_training_peers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationContext:
    """What operations need beside the store and the time; the same for the life of the process."""

    signing_key: SigningKey
    """Signs leases, directives, incarnation records and the coordinator's votes."""
    data_dir: Path = Path()
    """Directory that relative paths in the store (dataset_dir, checkpoints) start from."""
    heartbeat_interval_seconds: float = 10.0
    lease_ttl_seconds: float = 60.0
    """Life of a lease after its grant or last renewal."""
    directive_by_number: dict[tuple[str, int], DirectiveData] = field(default_factory=dict)
    """Cache filled by `load_directive`, by (run_id, number); the writer clears it when it takes
    something back, because a directive may be among that.
    """
    run_data_by_run: dict[str, RunData] = field(default_factory=dict)
    """Cache filled by `load_run_data`; touched by the writer thread only."""
    policy: SwarmPolicy = field(default_factory=SwarmPolicy)
    """When to act on silence, speeds and time."""
    random_bytes: Callable[[int], bytes] = secrets.token_bytes
    """Source of session keys and token secrets; tests pass their own."""


def load_run(tx: Transaction, run_id: str) -> RunRow:
    """The run. Raises RefusedError (UNKNOWN_RUN)."""
    row = tx.run(run_id)
    if row is None:
        raise RefusedError(
            f"run {run_id!r} is not known here",
            allowed="runs that `muster-coordinator run list` shows",
            remedy="check the join string or create the run",
            code=ErrorCode.UNKNOWN_RUN,
        )
    return row


def load_book(tx: Transaction, run_id: str) -> BookRow:
    """The run's ledger totals. Raises RefusedError (UNKNOWN_RUN)."""
    row = tx.book(run_id)
    if row is None:
        load_run(tx, run_id)
        raise CorruptDataError(
            f"run {run_id!r} has no ledger",
            allowed="a ledger of every run",
            remedy="restore the store from a backup",
        )
    return row


def load_run_data(tx: Transaction, context: OperationContext, run_id: str) -> RunData:
    """Spec, manifest and data order of a run, from memory after the first time. Raises
    CorruptDataError.
    """
    found = context.run_data_by_run.get(run_id)
    if found is not None:
        return found
    row = load_run(tx, run_id)
    spec = RunSpec.from_wire(row.spec)
    path = context.data_dir / row.dataset_dir / "manifest.json"
    try:
        manifest = Manifest.from_bytes(path.read_bytes())
    except OSError as error:
        raise CorruptDataError(
            f"manifest of run {run_id!r} cannot be read: {error}",
            allowed="the manifest that the run was created with",
            remedy=f"restore {path}",
        ) from error
    if manifest.dataset_id != row.dataset_id:
        raise CorruptDataError(
            f"{path} has digest {manifest.dataset_id}",
            allowed=f"{row.dataset_id}, as the run was created with",
            remedy="restore the dataset directory",
            code=ErrorCode.DIGEST_MISMATCH,
        )
    order = ScheduleOrder(spec.seed, manifest, spec.model.seq_len)
    data = RunData(spec=spec, manifest=manifest, order=order)
    context.run_data_by_run[run_id] = data
    return data


def load_directive_data(
    tx: Transaction, context: OperationContext, run_id: str, directive_number: int
) -> DirectiveData | None:
    """A directive of the run, from memory after the first time (a roster of 1,000 peers takes 2 ms
    to parse).
    """
    cache = context.directive_by_number
    found = cache.get((run_id, directive_number))
    if found is not None:
        return found
    row = tx.directive(run_id, directive_number)
    if row is None:
        return None
    directive = common_pb2.Directive.FromString(row.payload)
    tokens = {entry.peer_id: entry.round_tokens for entry in directive.roster}
    if len(cache) >= _CACHED_DIRECTIVES:
        cache.clear()
    found = DirectiveData(
        directive, tokens, sum(tokens.values()), sum(1 for count in tokens.values() if count)
    )
    cache[(run_id, directive_number)] = found
    return found


def load_directive(
    tx: Transaction, context: OperationContext, run_id: str, directive_number: int
) -> common_pb2.Directive | None:
    """The same, only the message."""
    data = load_directive_data(tx, context, run_id, directive_number)
    return None if data is None else data.directive


def answer_once(
    tx: Transaction,
    *,
    caller: str,
    request_id: str,
    method: str,
    request: object,
    now_unix_seconds: float,
    respond: Callable[[], Answer],
    encode: Callable[[Answer], bytes],
    decode: Callable[[bytes], Answer],
) -> Answer:
    """Return what `respond` gives, or what it gave when this caller sent this request id before.

    An empty request id is answered anew each time. The same id with another request is refused
    (UsageError): it is a client's bug that would otherwise hand out one answer for two questions.
    """
    if not request_id:
        return respond()
    digest = hashlib.sha256(f"{method}\n{request!r}".encode()).digest()
    known = tx.request(caller, request_id)
    if known is not None:
        if known.request_digest != digest:
            raise UsageError(
                f"request id {request_id!r} was used before for another {known.method} request",
                allowed="a new id for every new request",
                remedy="upgrade the client",
            )
        return decode(known.response)
    answer = respond()
    tx.insert_request(
        RequestRow(caller, request_id, method, digest, encode(answer), unix_ms(now_unix_seconds))
    )
    return answer


RECOVERING_META = "recovering_until_unix_ms"


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginRecovery:
    """Sent once by a starting coordinator, before it serves."""

    seconds: float
    """max(3 heartbeats, 30 s)."""


def begin_recovery(
    tx: Transaction, request: BeginRecovery, *, context: OperationContext, now_unix_seconds: float
) -> None:
    """From now for `seconds` nothing expires and nothing returned is granted again."""
    tx.set_meta(RECOVERING_META, json.dumps(unix_ms(now_unix_seconds + request.seconds)))


def is_recovering(tx: Transaction, *, now_unix_seconds: float) -> bool:
    """True while peers of a restarted coordinator are still coming back."""
    return unix_ms(now_unix_seconds) < int(tx.meta(RECOVERING_META) or 0)
