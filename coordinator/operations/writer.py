"""The only thread that writes: operations queue up, share one transaction, and are answered after
its fsync.

Servicers, ticker and page submit the same way. The thread drains up to MAX_BATCH queued operations,
runs them in one transaction, commits once, and then resolves their futures: so a reply means
durable, and an fsync is shared by everybody who waited for the last one (group commit; figures in
ops/bench/coordinator.md).

An operation that raises takes only its own changes back, and its caller gets the exception. Nearly
all refusals come before any change, so a batch is first tried without savepoints, which would cost
a quarter of its statements; if one is needed after all, the transaction is given up and the batch
runs again with them. Nobody has seen anything of the first try. The same happens when rows that
waited for the commit break a constraint. A store that fails (disk full) takes the whole batch back,
and every caller of it gets the store's error; the thread goes on.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from coordinator.operations.common import OperationContext
from coordinator.store.base import Store, Transaction, UndoNeededError
from protos.contract.errors import CorruptDataError, ErrorCode, MusterError, UnavailableError

MAX_BATCH = 512
"""Operations per commit: at about 0.2 ms each, nobody waits much longer than 0.1 s for the others.
"""

_LOGGER = logging.getLogger(__name__)

_Request = TypeVar("_Request", contravariant=True)
_Response = TypeVar("_Response", covariant=True)


class Operation(Protocol[_Request, _Response]):
    """A plain function over an open transaction; its changes are kept if it returns and undone if
    it raises.
    """

    def __call__(
        self,
        tx: Transaction,
        request: _Request,
        /,
        *,
        context: OperationContext,
        now_unix_seconds: float,
    ) -> _Response:
        """Do it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterStats:
    """What the writer has done since start, for metrics."""

    num_batches: int = 0
    num_operations: int = 0
    write_seconds: float = 0.0
    """Sum over batches of the time from the first operation to the end of the commit."""
    last_batch_seconds: float = 0.0
    num_failed_batches: int = 0
    num_queued: int = 0


@dataclass(slots=True, eq=False)
class _Job:
    operation: Operation[Any, Any]
    request: Any
    future: Future[Any] = field(default_factory=Future)
    result: Any = None
    error: BaseException | None = None

    def resolve(self) -> None:
        """Tell the caller, after the commit."""
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


class _Delivering:
    """Scope of one operation: whatever it raises is kept for its caller, not swallowed; a store's
    failure goes on up.
    """

    def __init__(self, job: _Job) -> None:
        self._job = job

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if error is None or isinstance(error, UndoNeededError) or is_store_failure(error):
            return False
        self._job.error = error
        return True


def is_store_failure(error: BaseException) -> bool:
    """True if the store itself failed: nothing of the transaction can be trusted to commit."""
    codes = (ErrorCode.STORE_UNAVAILABLE, ErrorCode.DISK_FULL)
    return isinstance(error, MusterError) and error.__cause__ is not None and error.code in codes


class Writer:
    """Owns the writer thread between `start` and `stop`."""

    def __init__(
        self, store: Store, *, context: OperationContext, clock: Callable[[], float]
    ) -> None:
        """`clock` returns unix seconds; every operation of a batch sees the same instant."""
        self._store = store
        self._context = context
        self._clock = clock
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._gate = threading.Lock()
        self._is_open = False
        self._stats = WriterStats()

    def start(self) -> Self:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._is_open = True
        self._thread.start()
        return self

    def stop(self) -> None:
        """Finish what is queued, then end the thread. Later submissions are refused."""
        with self._gate:
            if not self._is_open:
                return
            self._is_open = False
            self._jobs.put(None)
        assert self._thread is not None
        self._thread.join()

    def submit(
        self, operation: Operation[_Request, _Response], request: _Request
    ) -> Future[_Response]:
        """Queue an operation; the future resolves once its changes are durable. Raises
        UnavailableError if stopped.
        """
        job = _Job(operation, request)
        with self._gate:
            if not self._is_open:
                raise UnavailableError(
                    "the coordinator is shutting down",
                    allowed="a coordinator that serves",
                    remedy="try again when it is back",
                    code=ErrorCode.NOT_READY,
                )
            self._jobs.put(job)
        return job.future

    def submit_and_wait(
        self,
        operation: Operation[_Request, _Response],
        request: _Request,
        *,
        deadline_seconds: float = 30.0,
    ) -> _Response:
        """Submit and wait for the durable result; raises what the operation raised."""
        return self.submit(operation, request).result(timeout=deadline_seconds)

    def read(self, operation: Operation[_Request, _Response], request: _Request) -> _Response:
        """Run an operation that only reads in the calling thread, on the newest committed state."""
        with self._store.read() as tx:
            return operation(tx, request, context=self._context, now_unix_seconds=self._clock())

    @property
    def stats(self) -> WriterStats:
        """Newest figures; a consistent set."""
        return self._stats

    def _run(self) -> None:
        while True:
            first = self._jobs.get()
            jobs: list[_Job] = []
            is_last = first is None
            if first is not None:
                jobs.append(first)
            while not is_last and len(jobs) < MAX_BATCH:
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    break
                if job is None:
                    is_last = True
                else:
                    jobs.append(job)
            self._run_batch([job for job in jobs if job.future.set_running_or_notify_cancel()])
            if is_last:
                return

    def _run_batch(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        start_seconds = time.perf_counter()
        now_unix_seconds = self._clock()
        is_failed = False
        try:
            self._try_jobs(jobs, now_unix_seconds)
        except Exception as error:
            is_failed = True
            self._context.directive_by_number.clear()
            if isinstance(error, MusterError):
                _LOGGER.error("store failed, %d operations taken back: %s", len(jobs), error)
            else:
                _LOGGER.exception("%d operations taken back", len(jobs))
            for job in jobs:
                job.error = _batch_error(error)
        self._count(jobs, time.perf_counter() - start_seconds, is_failed=is_failed)
        for job in jobs:
            job.resolve()

    def _try_jobs(self, jobs: list[_Job], now_unix_seconds: float) -> None:
        """Without savepoints, and with them if one is needed or rows that waited for the commit
        cannot be written: then their own operation is found and fails alone.
        """
        try:
            self._run_jobs(jobs, now_unix_seconds, has_savepoints=False)
        except MusterError:
            raise
        except Exception as error:
            if not isinstance(error, UndoNeededError):
                _LOGGER.warning("%d operations run again one by one: %s", len(jobs), error)
            self._context.directive_by_number.clear()
            self._run_jobs(jobs, now_unix_seconds, has_savepoints=True)

    def _run_jobs(self, jobs: list[_Job], now_unix_seconds: float, *, has_savepoints: bool) -> None:
        """One transaction. Without savepoints it raises UndoNeededError if one is needed after
        all.
        """
        with self._store.write() as tx:
            for job in jobs:
                job.error = None
                scope = tx.savepoint() if has_savepoints else tx.hopeful_scope()
                with _Delivering(job), scope:
                    job.result = job.operation(
                        tx,
                        job.request,
                        context=self._context,
                        now_unix_seconds=now_unix_seconds,
                    )
                if has_savepoints and job.error is not None:
                    self._context.directive_by_number.clear()

    def _count(self, jobs: list[_Job], seconds: float, *, is_failed: bool) -> None:
        before = self._stats
        self._stats = WriterStats(
            num_batches=before.num_batches + 1,
            num_operations=before.num_operations + len(jobs),
            write_seconds=before.write_seconds + seconds,
            last_batch_seconds=seconds,
            num_failed_batches=before.num_failed_batches + is_failed,
            num_queued=self._jobs.qsize(),
        )


def _batch_error(error: Exception) -> Exception:
    if isinstance(error, CorruptDataError) or not isinstance(error, MusterError):
        return error
    return UnavailableError(
        error.found, allowed=error.allowed, remedy=error.remedy, code=error.code
    )
