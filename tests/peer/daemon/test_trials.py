"""A trial's process that hangs is ended, and one that was given to somebody else is ended too."""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from peer import session_events as ev
from peer.daemon import child_watch, trials
from peer.daemon.duties import Duties
from peer.metrics import PeerMetrics
from peer.supervisor import Supervisor
from protos.muster.v1 import duties_pb2
from tests.peer.daemon.test_duties import Reports

_TURNS = """
import sys, time
from peer.ipc import Channel
channel = Channel.from_fd(int(sys.argv[sys.argv.index("--channel-fd") + 1]))
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    channel.send("turn", longest_turn_seconds=0.001)
    time.sleep(0.05)
"""


async def watched(
    folder: Path, *, seconds: float, stop: bool, start_seconds: float = 300.0
) -> tuple[str, str]:
    """A process that comes round for `seconds`, stopped (SIGSTOP) once it runs or not: why it was
    ended, and how it ended.
    """
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[3]))
    supervisor = Supervisor(
        logs=folder, environment=environment, record_children=lambda records: None
    )
    command = [sys.executable, "-c", _TURNS, str(seconds)]
    child = await supervisor.spawn("trial", command, channel_flag="--channel-fd")
    try:
        watching = asyncio.ensure_future(trials.watch(child, start_seconds))
        if stop:
            child.process.send_signal(signal.SIGSTOP)
        end = await asyncio.wait_for(supervisor.wait(child), 30)
        watching.cancel()
        await asyncio.wait({watching})
        return "" if watching.cancelled() else watching.result(), end
    finally:
        await supervisor.close()


@pytest.mark.slow
def test_a_process_that_hangs_is_ended_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "_LEAST_TURN_SECONDS", 0.1)
    monkeypatch.setattr(trials, "_TICK_SECONDS", 0.05)
    reason, end = asyncio.run(watched(tmp_path, seconds=60.0, stop=True, start_seconds=1.0))
    assert reason.startswith("no progress for 1") and "SIGKILL" in end


def test_a_process_that_comes_round_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "_LEAST_TURN_SECONDS", 0.5)
    assert asyncio.run(watched(tmp_path, seconds=0.3, stop=False)) == ("", "ended with exit code 0")


class _EndedProcess:
    def kill(self) -> None:
        raise ProcessLookupError


class _EndedChild:
    """One whose end nobody has noticed yet."""

    process = _EndedProcess()

    class channel:  # noqa: N801
        @staticmethod
        async def receive() -> None:
            await asyncio.get_running_loop().create_future()


def test_a_process_that_ends_just_before_it_is_killed_has_ended_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trials, "_TICK_SECONDS", 0.05)
    monkeypatch.setattr(child_watch, "MIN_TURN_SECONDS", 0.01)
    watching = trials.watch(_EndedChild(), 0.1)  # type: ignore[arg-type]
    assert asyncio.run(asyncio.wait_for(watching, 5)) == ""


def test_each_hand_out_of_a_trial_has_twice_the_time_to_its_first_update() -> None:
    assert [trials._start_seconds(fence) for fence in (0, 1, 2, 5)] == [300, 300, 600, 4800]


@pytest.mark.parametrize("named", [("", 0), ("d", 4), ("other", 1)])
def test_a_trial_that_is_not_ours_any_more_ends_without_a_report(
    tmp_path: Path, named: tuple[str, int]
) -> None:
    metrics = PeerMetrics()

    async def story() -> tuple[list[Any], list[Any], bool]:
        begun, ended, reports, fed = asyncio.Event(), asyncio.Event(), Reports(), []

        async def train(duty: duties_pb2.Duty) -> duties_pb2.TrialResult:
            begun.set()
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                ended.set()
            raise AssertionError("it is never done")

        duties = Duties(
            reports,  # type: ignore[arg-type]
            tmp=tmp_path,
            send=lambda *_, **__: True,
            metrics=metrics,
            feed=fed.append,
            run_trial=train,
        )
        duty = duties_pb2.Duty(duty_id="d", fence=3, kind=duties_pb2.DUTY_KIND_TRIAL)
        task = asyncio.ensure_future(duties.perform(duty, heldout_paths=()))
        await asyncio.wait_for(begun.wait(), 5)
        duties.keep_trial(time.monotonic(), "d", 3)
        duties.keep_trial(0.0, "", 0)  # the answer to a heartbeat from before the trial
        await asyncio.wait({task}, timeout=0.05)
        assert not ended.is_set()
        duties.keep_trial(time.monotonic(), *named)
        await asyncio.wait_for(task, 5)
        return reports.requests, fed, ended.is_set()

    requests, fed, is_ended = asyncio.run(story())
    assert requests == [] and is_ended and [event.duty_id for event in fed] == ["d"]
    labels = {"kind": ev.DutyKind.TRIAL.value, "outcome": "withdrawn"}
    assert metrics.registry.get_sample_value("muster_peer_duties_total", labels) == 1.0
