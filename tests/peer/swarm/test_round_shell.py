"""What the shell does when a step ends, or a contribution, in the middle of something else."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from peer.background import BackgroundTasks
from peer.swarm import round_shell
from peer.swarm import round_types as rt
from peer.swarm.offers import Offers
from peer.swarm.round_shell import RoundShell
from peer.swarm.upload_pacer import UploadPacer
from protos.muster.v1 import rounds_pb2
from tests.peer.swarm.one_machine import LEADER, OTHERS, machine_of, message_of, own_of


def _shell(failures: list[BaseException]) -> Any:
    """The shell of a member that does not lead, without a network."""
    shell: Any = RoundShell.__new__(RoundShell)
    shell.machine = machine_of(OTHERS[0])
    shell._own = shell._own_encoded = shell._reduction = None
    shell._fetching = {(b"averaged", (LEADER,))}
    shell._tasks = BackgroundTasks(failures.append)
    shell._timeline = SimpleNamespace(phase="FORM")
    shell._channel = SimpleNamespace(send=lambda *_, **__: None)
    shell.delivery = SimpleNamespace(deliver=_delivered)
    shell._transport = SimpleNamespace(
        link_meter=SimpleNamespace(upload_bytes_per_second=0.0, download_bytes_per_second=0.0),
        upload_pacer=UploadPacer(None),
        moved_by_peer=dict,
    )
    shell.on_phase = None
    return shell


async def _delivered(peer_id: str, message: rounds_pb2.RoundMessage) -> None:
    pass


def test_a_fetch_whose_step_ends_before_it_begins_ends_nothing_else() -> None:
    failures: list[BaseException] = []

    async def scenario() -> None:
        shell = _shell(failures)
        await shell._do(rt.FetchBytes(b"averaged", (LEADER,)))
        shell.end()
        await asyncio.sleep(0)

    asyncio.run(scenario())
    assert failures == []


def test_new_holders_are_asked_while_an_old_one_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that is proposed again names others who hold its bytes."""
    asked: list[str] = []

    async def scenario() -> None:
        shell, end = _shell([]), asyncio.Event()
        codec = SimpleNamespace(name="fp32")
        shell._replica = SimpleNamespace(
            averaged=lambda digest: None, contribution_values=lambda step: 1, codec=codec
        )
        shell._key = SimpleNamespace(peer_id=OTHERS[0])

        async def fetch(transport: object, holders: list[str], *_: object, **__: object) -> None:
            asked.extend(holders)
            await end.wait()

        monkeypatch.setattr(round_shell, "fetch_averaged", fetch)
        for holder in (LEADER, OTHERS[1], LEADER):
            await shell._do(rt.FetchBytes(b"other", (holder,)))
            await asyncio.sleep(0)
        end.set()

    asyncio.run(scenario())
    assert asked == [LEADER, OTHERS[1]]


def test_who_is_refused_and_has_no_more_work_joins_as_an_idle_member() -> None:
    """Else the leader would wait for it until its deadline."""

    async def scenario() -> None:
        shell = _shell([])
        shell._enter = lambda phase: None
        reporter: Any = SimpleNamespace(outcome=lambda *_, **__: None)
        offers = Offers(shell, SimpleNamespace(), reporter, own_peer_id=OTHERS[0])  # type: ignore[arg-type]
        await shell.contribute(own_of(OTHERS[0]))
        refusal = rounds_pb2.RoundRefusal(
            kind=rounds_pb2.REFUSAL_KIND_INVALID, reason="a lease is not signed"
        )
        await shell.handle(rt.Received(LEADER, message_of(refusal=refusal)))
        assert shell.own is None and "not signed" in shell.refused_reason
        await offers.idle(True)
        assert shell.own is not None and not shell.has_work

    asyncio.run(scenario())


def _silent_leader(
    *, outer_step: int, late_seconds: float, silent: tuple[str, float] = (LEADER, 1.0)
) -> Any:
    """A reduction of attempt 3 in which the leader has sent nothing for a second, and another
    member has said all along that it waits.
    """
    return SimpleNamespace(
        place=(1, outer_step, 3),
        silent_peer=lambda patience_seconds: silent,
        late_seconds_by_peer={LEADER: late_seconds},
        waiting_seconds_by_peer={OTHERS[1]: 1.0},
        begin_seconds=time.monotonic() - 1.0,
    )


def test_who_was_silent_in_a_step_that_has_ended_is_not_late_in_the_next() -> None:
    """A reduction that fails as its step ends is told of when the next one has begun."""
    shell, places = _shell([]), set()
    shell._post = lambda place, event: places.add(place)
    shell._stall_seconds = 0.9
    shell._note_silent(_silent_leader(outer_step=0, late_seconds=1.0))
    assert shell.place == (1, 1) and places == {(1, 0)}


def test_who_is_silent_is_late_also_while_others_still_send() -> None:
    """Time is booked on the late only while at least as many others have delivered; a member that
    is quicker to give up counts the silence alone, so we do, too.
    """
    shell, told = _shell([]), []
    shell._post = lambda place, event: told.append(event)
    shell._stall_seconds = 0.9
    shell._note_silent(_silent_leader(outer_step=1, late_seconds=0.0))
    assert rt.PeersLate(3, frozenset((LEADER,))) in told


def test_who_alone_says_that_it_waits_is_told_of_if_nobody_was_late() -> None:
    shell, told = _shell([]), []
    shell._post = lambda place, event: told.append(event)
    shell._stall_seconds = 0.9
    shell._note_silent(_silent_leader(outer_step=1, late_seconds=0.0, silent=("", 0.0)))
    assert told == [rt.PeersLate(3, frozenset(), OTHERS[1])]
