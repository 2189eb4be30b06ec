"""Duties beside training: evaluate through the trainer, write and upload checkpoints, fetch one
when no member has the state.

A duty ends in a report, whatever happens; its fence lets the coordinator refuse one that it has
given to somebody else since. How long it may take is not bounded here: a child that makes no
progress is killed by its watch (child_watch.py), and heartbeats renew the duty meanwhile. A trial
that the coordinator does not name any more is ended: it was given to somebody else, or its study is
over.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer import session_events as ev
from peer.coordinator_client import CoordinatorClient
from peer.ipc import Message
from peer.metrics import PeerMetrics
from peer.session_events import ChildName
from protos.contract.channel import MAX_STREAM_PART_BYTES
from protos.contract.checkpoint_index import CheckpointIndex
from protos.contract.errors import CorruptDataError, MusterError, UnavailableError
from protos.contract.telemetry import PEER_DUTIES, LogField
from protos.muster.v1 import common_pb2, duties_pb2

_LOGGER = logging.getLogger(__name__)
_RETRY_SECONDS = 2.0
_MAX_DIGESTS = 512
DUTY_KINDS = {
    duties_pb2.DUTY_KIND_EVALUATE: ev.DutyKind.EVALUATE,
    duties_pb2.DUTY_KIND_CHECKPOINT: ev.DutyKind.CHECKPOINT,
    duties_pb2.DUTY_KIND_TRIAL: ev.DutyKind.TRIAL,
}

FetchMirrored = Callable[[int], tuple[Path, CheckpointIndex]]
"""Newest checkpoint of a mirror, not above an outer step; blocks; raises UnavailableError."""

Send = Callable[..., bool]
"""(child, kind, **fields); False if the child is gone."""


@dataclass(slots=True, kw_only=True)
class _Trial:
    """A trial that is being trained."""

    duty: duties_pb2.Duty
    training: asyncio.Future[duties_pb2.TrialResult]
    begin_seconds: float
    """Monotonic."""
    is_withdrawn: bool = False


class Duties:
    """Work on duties, and answers of the children to it."""

    def __init__(
        self,
        client: CoordinatorClient,
        *,
        tmp: Path,
        send: Send,
        metrics: PeerMetrics,
        feed: Callable[[ev.Event], None],
        run_trial: Callable[[duties_pb2.Duty], Awaitable[duties_pb2.TrialResult]],
        mirrors: FetchMirrored | None = None,
    ) -> None:
        self._client = client
        self._run_trial, self._mirrors = run_trial, mirrors
        self._tmp = tmp
        self._send = send
        self._metrics = metrics
        self._feed = feed
        self._answer_by_id: dict[str, tuple[ChildName, asyncio.Future[Message]]] = {}
        self._digest_by_state: dict[tuple[int, int], bytes] = {}
        self._trial: _Trial | None = None
        self._is_fetching = False
        self.uploaded_bytes = 0
        """Of the checkpoint that is on its way to the coordinator, or was last."""

    def keep_trial(self, send_seconds: float, duty_id: str, fence: int) -> None:
        """A heartbeat sent at `send_seconds` (monotonic) names this duty as the peer's. A trial
        begun before and not named is not this peer's any more: it ends, and nothing is reported.
        """
        trial = self._trial
        if trial is None or trial.is_withdrawn or trial.begin_seconds > send_seconds:
            return
        if (trial.duty.duty_id, trial.duty.fence) != (duty_id, fence):
            trial.is_withdrawn = True
            trial.training.cancel()

    def note_state(self, *, incarnation: int, outer_step: int, state_digest: bytes) -> None:
        """Remember the digest of a state, for the report of its evaluation."""
        self._digest_by_state[(incarnation, outer_step)] = state_digest
        while len(self._digest_by_state) > _MAX_DIGESTS:
            del self._digest_by_state[next(iter(self._digest_by_state))]

    def take_answer(self, request_id: str, message: Message) -> None:
        """A child answered."""
        _, waiting = self._answer_by_id.pop(request_id, (None, None))
        if waiting is not None and not waiting.done():
            waiting.set_result(message)

    def child_ended(self, child: ChildName) -> None:
        """No answer comes from it: an evaluation is begun anew with the next trainer (session.py),
        so its first try ends without a word; what the swarm process was asked has failed.
        """
        for asked, waiting in self._answer_by_id.values():
            if asked is child and not waiting.done():
                _end_waiting(child, waiting)

    async def perform(self, duty: duties_pb2.Duty, *, heldout_paths: tuple[Path, ...]) -> bool:
        """Do a duty and report it; returns whether it was done."""
        kind = DUTY_KINDS[duty.kind]
        reason, outcome = "", "done"
        try:
            if kind is ev.DutyKind.EVALUATE:
                await self._evaluate(duty, heldout_paths)
            elif kind is ev.DutyKind.TRIAL:
                outcome = await self._perform_trial(duty)
            else:
                outcome = await self._upload_checkpoint(duty)
        except (MusterError, OSError) as error:
            reason, outcome = str(error) or type(error).__name__, "failed"
        self._metrics.add(PEER_DUTIES, 1, {"kind": kind.value, "outcome": outcome})
        if reason:
            _LOGGER.warning("%s=%s (%s) failed: %s", LogField.DUTY, duty.duty_id, kind, reason)
            await self._report_failure(duty, reason)
        self._feed(ev.DutyEnded(duty_id=duty.duty_id, fence=duty.fence))
        return outcome == "done"

    async def _evaluate(self, duty: duties_pb2.Duty, heldout_paths: tuple[Path, ...]) -> None:
        answer = await self._ask(
            ChildName.TRAINER,
            "evaluate",
            request_id=duty.duty_id,
            duty_id=duty.duty_id,
            eval_tokens=duty.eval_tokens,
            heldout_paths=[str(path) for path in heldout_paths],
        )
        state = (answer["incarnation"], answer["outer_step"])
        if answer.get("reason"):
            raise CorruptDataError(answer["reason"])
        if state not in self._digest_by_state:
            raise CorruptDataError(f"state {state} was evaluated, its digest is not known here")
        evaluation = duties_pb2.Evaluation(
            incarnation=state[0],
            outer_step=state[1],
            state_digest=self._digest_by_state[state],
            total_nats=answer["total_nats"],
            num_tokens=answer["num_tokens"],
            num_bytes=answer["num_bytes"],
            schedule_tokens=answer["schedule_tokens"],
        )
        request = duties_pb2.ReportDutyRequest(
            duty_id=duty.duty_id, fence=duty.fence, evaluation=evaluation
        )
        response = await self._client.report_duty(request)
        if not response.is_accepted:
            _LOGGER.info("%s=%s not accepted: %s", LogField.DUTY, duty.duty_id, response.reason)

    async def _perform_trial(self, duty: duties_pb2.Duty) -> str:
        """Returns the outcome."""
        trial = self._trial = _Trial(
            duty=duty,
            training=asyncio.ensure_future(self._run_trial(duty)),
            begin_seconds=time.monotonic(),
        )
        try:
            result = await trial.training
        except asyncio.CancelledError:
            if not trial.is_withdrawn:
                raise
            _LOGGER.info("%s=%s was withdrawn and is ended", LogField.DUTY, duty.duty_id)
            return "withdrawn"
        finally:
            self._trial = None
        await self._report_trial(duty, result)
        return "done"

    async def _report_trial(self, duty: duties_pb2.Duty, result: duties_pb2.TrialResult) -> None:
        request = duties_pb2.ReportDutyRequest(duty_id=duty.duty_id, fence=duty.fence, trial=result)
        while True:  # minutes or hours of work: a coordinator that is away does not cost them
            try:
                response = await self._client.report_duty(request)
                break
            except UnavailableError as error:
                _LOGGER.info("%s=%s: not reported: %s", LogField.DUTY, duty.duty_id, error.found)
                await asyncio.sleep(_RETRY_SECONDS)
        if not response.is_accepted:
            _LOGGER.info("%s=%s not accepted: %s", LogField.DUTY, duty.duty_id, response.reason)

    async def _upload_checkpoint(self, duty: duties_pb2.Duty) -> str:
        """Returns the outcome."""
        path = self._tmp / f"upload-{uuid.uuid4().hex}.safetensors"
        try:
            answer = await self._ask(
                ChildName.SWARM,
                "write_checkpoint",
                request_id=path.stem,
                path=str(path),
            )
            if not answer["path"]:
                raise CorruptDataError("the swarm process has no whole state to write now")
            written = Path(answer["path"])
            header = duties_pb2.CheckpointHeader(
                duty_id=duty.duty_id,
                fence=duty.fence,
                attestation=common_pb2.Signed.FromString(answer["attestation"]),
                total_bytes=written.stat().st_size,
            )
            self.uploaded_bytes = 0
            response = await self._client.upload_checkpoint(header, self._parts_of(written))
            if not response.is_accepted:
                _LOGGER.info("%s=%s not accepted: %s", LogField.DUTY, duty.duty_id, response.reason)
            return "done" if response.is_accepted else "refused"
        finally:
            path.unlink(missing_ok=True)

    def _parts_of(self, path: Path) -> Iterator[bytes]:
        with path.open("rb") as file:
            while part := file.read(MAX_STREAM_PART_BYTES):
                yield part
                self.uploaded_bytes += len(part)

    async def _report_failure(self, duty: duties_pb2.Duty, reason: str) -> None:
        request = duties_pb2.ReportDutyRequest(
            duty_id=duty.duty_id, fence=duty.fence, failure_reason=reason[:500]
        )
        try:
            await self._client.report_duty(request)
        except MusterError as error:
            _LOGGER.info(
                "%s=%s: failure not reported: %s", LogField.DUTY, duty.duty_id, error.found
            )

    async def _ask(self, child: ChildName, kind: str, *, request_id: str, **fields: Any) -> Message:
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._answer_by_id[request_id] = child, answer
        if kind == "write_checkpoint":
            fields["request_id"] = request_id
        try:
            if not self._send(child, kind, **fields):  # it ended before it was asked
                _end_waiting(child, answer)
            return await answer
        finally:
            if self._answer_by_id.get(request_id) == (child, answer):
                del self._answer_by_id[request_id]

    async def fetch_checkpoint(self, *, max_outer_step: int) -> None:
        """Bring the coordinator's newest checkpoint here, or a mirror's, and tell the swarm
        process; it asks again if none comes, and is not heard while one is on its way.
        """
        if self._is_fetching:
            return
        self._is_fetching = True
        try:
            await self._fetch_checkpoint(max_outer_step)
        finally:
            self._is_fetching = False

    async def _fetch_checkpoint(self, max_outer_step: int) -> None:
        for older in self._tmp.glob("download-*.safetensors"):
            older.unlink(missing_ok=True)
        path = self._tmp / f"download-{uuid.uuid4().hex}.safetensors"
        try:
            stream = self._client.fetch_checkpoint(max_outer_step=max_outer_step)
            header = await _save_checkpoint(stream, path)
            place, digest = (header.incarnation, header.outer_step), header.state_digest
        except (MusterError, OSError) as error:
            path.unlink(missing_ok=True)
            _LOGGER.warning("no checkpoint from the coordinator: %s", error)
            if self._mirrors is None:
                return
            try:
                path, index = await asyncio.to_thread(self._mirrors, max_outer_step)
            except (MusterError, OSError) as problem:
                _LOGGER.warning("%s", problem)
                return
            place, digest = (index.incarnation, index.outer_step), bytes.fromhex(index.state_digest)
            _LOGGER.info("checkpoint %d/%d came from a mirror", *place)
        self._send(
            ChildName.SWARM,
            "checkpoint_available",
            path=str(path),
            incarnation=place[0],
            outer_step=place[1],
            state_digest=digest,
        )


def _end_waiting(child: ChildName, waiting: asyncio.Future[Message]) -> None:
    if child is ChildName.TRAINER:
        waiting.cancel()
    else:
        waiting.set_exception(UnavailableError("the swarm process ended"))


async def _save_checkpoint(
    stream: AsyncIterator[duties_pb2.FetchCheckpointResponse], path: Path
) -> duties_pb2.FetchCheckpointResponse:
    """Write the streamed file; returns the header. The reader checks the state's digest. Raises
    CorruptDataError.
    """
    header: duties_pb2.FetchCheckpointResponse | None = None
    num_bytes = 0
    with path.open("wb") as file:
        async for message in stream:
            header = header or message
            num_bytes += len(message.data)
            if num_bytes > header.total_bytes:
                break
            file.write(message.data)
    if header is None or num_bytes != header.total_bytes:
        expected = header.total_bytes if header else "a header"
        raise CorruptDataError(
            f"a checkpoint of {num_bytes} bytes",
            allowed=f"{expected}",
            remedy="it is asked for again",
        )
    return header
