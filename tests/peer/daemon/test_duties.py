"""A duty whose child ends: begun anew by the next trainer, or reported as failed at once."""

import asyncio
from pathlib import Path
from typing import Any

from peer import session_events as ev
from peer.daemon.duties import Duties
from peer.metrics import PeerMetrics
from peer.session_events import ChildName
from protos.muster.v1 import common_pb2, duties_pb2


class Reports:
    """The one call of a coordinator's client that is made here."""

    def __init__(self) -> None:
        self.requests: list[duties_pb2.ReportDutyRequest] = []

    async def report_duty(
        self, request: duties_pb2.ReportDutyRequest
    ) -> duties_pb2.ReportDutyResponse:
        self.requests.append(request)
        return duties_pb2.ReportDutyResponse(is_accepted=True)


async def no_trial(duty: duties_pb2.Duty) -> duties_pb2.TrialResult:
    raise AssertionError(f"{duty.duty_id} is no trial")


async def perform_asking_nobody(
    kind: Any, tmp: Path
) -> tuple[bool, list[duties_pb2.ReportDutyRequest]]:
    """A duty whose child ended just before it was asked: was the task cancelled, what was said?"""
    reports = Reports()
    duties = Duties(
        reports,  # type: ignore[arg-type]
        tmp=tmp,
        send=lambda *_, **__: False,
        metrics=PeerMetrics(),
        feed=lambda _: None,
        run_trial=no_trial,
    )
    duty = duties_pb2.Duty(duty_id="d", fence=3, kind=kind)
    task = asyncio.ensure_future(duties.perform(duty, heldout_paths=()))
    await asyncio.wait({task}, timeout=5)
    assert task.done()
    return task.cancelled(), reports.requests


async def perform_until_the_end_of(
    child: ChildName, kind: Any, tmp: Path
) -> tuple[bool, list[duties_pb2.ReportDutyRequest], list[ev.Event]]:
    """Begin a duty, end the child that was asked; was the task cancelled, what was said?"""
    reports, fed, asked = Reports(), [], asyncio.Event()

    def send(*_: Any, **__: Any) -> bool:
        asked.set()
        return True

    duties = Duties(
        reports,  # type: ignore[arg-type]
        tmp=tmp,
        send=send,
        metrics=PeerMetrics(),
        feed=fed.append,
        run_trial=no_trial,
    )
    duty = duties_pb2.Duty(duty_id="d", fence=3, kind=kind)
    task = asyncio.ensure_future(duties.perform(duty, heldout_paths=()))
    await asyncio.wait_for(asked.wait(), 5)
    duties.child_ended(child)
    await asyncio.wait({task}, timeout=5)
    assert task.done()
    return task.cancelled(), reports.requests, fed


def test_an_evaluation_ends_without_a_word_with_its_trainer(tmp_path: Path) -> None:
    found = asyncio.run(
        perform_until_the_end_of(ChildName.TRAINER, duties_pb2.DUTY_KIND_EVALUATE, tmp_path)
    )
    assert found == (True, [], [])


def test_a_checkpoint_fails_with_the_swarm_process(tmp_path: Path) -> None:
    is_cancelled, requests, fed = asyncio.run(
        perform_until_the_end_of(ChildName.SWARM, duties_pb2.DUTY_KIND_CHECKPOINT, tmp_path)
    )
    assert not is_cancelled and [r.fence for r in requests] == [3]
    assert "swarm process ended" in requests[0].failure_reason
    assert fed == [ev.DutyEnded(duty_id="d", fence=3)]


def test_a_failure_without_a_text_is_reported_as_one(tmp_path: Path) -> None:
    reports = Reports()

    async def no_answer(duty: duties_pb2.Duty) -> duties_pb2.TrialResult:
        raise TimeoutError

    duties = Duties(
        reports,  # type: ignore[arg-type]
        tmp=tmp_path,
        send=lambda *_, **__: False,
        metrics=PeerMetrics(),
        feed=lambda _: None,
        run_trial=no_answer,
    )
    duty = duties_pb2.Duty(duty_id="d", fence=3, kind=duties_pb2.DUTY_KIND_TRIAL)
    assert not asyncio.run(duties.perform(duty, heldout_paths=()))
    assert [request.failure_reason for request in reports.requests] == ["TimeoutError"]


def test_a_checkpoint_that_is_refused_is_not_given(tmp_path: Path) -> None:
    class Refusing(Reports):
        async def upload_checkpoint(self, *_: Any) -> duties_pb2.UploadCheckpointResponse:
            return duties_pb2.UploadCheckpointResponse(is_accepted=False, reason="not the proved")

    def write(_: ChildName, kind: str, *, request_id: str, path: str) -> bool:
        Path(path).write_bytes(b"state")
        answer = {"path": path, "attestation": common_pb2.Signed().SerializeToString()}
        asyncio.get_running_loop().call_soon(duties.take_answer, request_id, answer)
        return True

    duties = Duties(
        Refusing(),  # type: ignore[arg-type]
        tmp=tmp_path,
        send=write,
        metrics=PeerMetrics(),
        feed=lambda _: None,
        run_trial=no_trial,
    )
    duty = duties_pb2.Duty(duty_id="d", fence=3, kind=duties_pb2.DUTY_KIND_CHECKPOINT)
    assert not asyncio.run(duties.perform(duty, heldout_paths=()))


def test_a_duty_whose_child_is_gone_already_waits_for_no_answer(tmp_path: Path) -> None:
    evaluated = asyncio.run(perform_asking_nobody(duties_pb2.DUTY_KIND_EVALUATE, tmp_path))
    assert evaluated == (True, [])
    is_cancelled, requests = asyncio.run(
        perform_asking_nobody(duties_pb2.DUTY_KIND_CHECKPOINT, tmp_path)
    )
    assert not is_cancelled and "swarm process ended" in requests[0].failure_reason
