"""What calls to a member come to: an answer, or the word that it is gone, and one more call."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from peer.swarm import round_types as rt
from peer.swarm.contacts import Contacts
from peer.swarm.delivery import Delivery
from peer.swarm.pace import Pace
from peer.swarm.transport import PeerCallError
from protos.muster.v1 import rounds_pb2

PLACE = (1, 7)
MESSAGE = rounds_pb2.RoundMessage(incarnation=1, outer_step=7, nudge=rounds_pb2.Nudge())


class _Member:
    """Answers calls that wait for so long; what others wait for passes at once."""

    def __init__(
        self, answer_seconds: float, *, clock: list[float], stopped_seconds: float = 0.0
    ) -> None:
        """`stopped_seconds`: how long the caller is stopped during its first call."""
        self._answer_seconds, self._clock = answer_seconds, clock
        self._stopped_seconds = stopped_seconds
        self.timeouts: list[float] = []

    def is_connected(self, peer_id: str) -> bool:
        return True

    async def call(self, *_: Any, timeout_seconds: float) -> rounds_pb2.RoundAck:
        self.timeouts.append(timeout_seconds)
        await asyncio.sleep(0)
        spent_seconds = min(self._answer_seconds, timeout_seconds) + self._stopped_seconds
        self._clock[0] += spent_seconds
        self._stopped_seconds = 0.0
        if max(self._answer_seconds, spent_seconds) > timeout_seconds:
            raise PeerCallError("no answer", is_down=True)
        return rounds_pb2.RoundAck()


def _delivered(
    monkeypatch: pytest.MonkeyPatch,
    answer_seconds: float,
    *,
    num_messages: int = 1,
    stopped_seconds: float = 0.0,
) -> tuple[list[float], list[rt.Event]]:
    """How long each call waited, and what was told of them."""
    clock, told = [100.0], []
    time = SimpleNamespace(monotonic=lambda: clock[0])
    monkeypatch.setattr("peer.swarm.delivery.time", time)
    member = _Member(answer_seconds, clock=clock, stopped_seconds=stopped_seconds)
    pace = Pace()
    pace.add_call(0.0)

    def post(place: tuple[int, int], event: rt.Event) -> None:
        assert place == PLACE
        told.append(event)

    async def scenario() -> None:
        calls = Delivery(member, Contacts(pace), post)  # type: ignore[arg-type]
        for _ in range(num_messages):
            await calls.deliver("b", MESSAGE)

    asyncio.run(scenario())
    return member.timeouts, told


def test_an_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    timeouts, told = _delivered(monkeypatch, 0.01)
    assert timeouts == [0.75] and [type(event) for event in told] == [rt.Acked]


def test_two_calls_in_a_row_and_the_member_is_gone_but_waited_for_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timeouts, told = _delivered(monkeypatch, 1000.0)
    assert timeouts == [0.75, pytest.approx(0.525), 4.0]
    assert [type(event) for event in told] == [rt.PeerUnreachable]


def test_a_message_of_many_bytes_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that forms a group of many members with large contributions."""
    join = rounds_pb2.JoinGroup(piece_digests=[bytes(32)] * 15_000)
    large = rounds_pb2.RoundMessage(incarnation=1, outer_step=7, join_group=join)
    monkeypatch.setattr("tests.peer.swarm.test_delivery.MESSAGE", large)
    timeouts, told = _delivered(monkeypatch, 2.0)
    assert timeouts == [pytest.approx(0.75 + (large.ByteSize() - 16_384) / 250_000)]
    assert [type(event) for event in told] == [rt.Acked]


def test_whoever_was_stopped_itself_takes_nobody_for_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its timers have all run out when it wakes up, also those of answers that have come."""
    timeouts, told = _delivered(monkeypatch, 0.01, stopped_seconds=10.0)
    assert timeouts == [0.75, pytest.approx(0.525)]
    assert [type(event) for event in told] == [rt.Acked]


def test_a_slow_member_is_heard_again_and_given_longer_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timeouts, told = _delivered(monkeypatch, 1.0, num_messages=3)
    assert timeouts[:3] == [0.75, pytest.approx(0.525), 4.0]
    assert len(timeouts) == 5 and min(timeouts[3:]) > 2.0
    assert [type(event) for event in told] == [rt.PeerUnreachable, rt.Acked, rt.Acked, rt.Acked]


def test_who_asks_often_is_told_once_at_a_time() -> None:
    """Every small message of an old step is answered with that step's certificate."""
    num_calls, end = [0], asyncio.Event()

    async def call(*_: Any) -> rounds_pb2.RoundAck:
        num_calls[0] += 1
        await end.wait()
        return rounds_pb2.RoundAck()

    async def scenario() -> None:
        transport: Any = SimpleNamespace(call=call)
        calls = Delivery(transport, Contacts(Pace()), lambda place, event: None)
        tellings = [asyncio.ensure_future(calls.tell("b", MESSAGE)) for _ in range(100)]
        await asyncio.sleep(0)
        end.set()
        await asyncio.gather(*tellings)
        assert num_calls == [1]
        await calls.tell("b", MESSAGE)
        assert num_calls == [2]

    asyncio.run(scenario())
