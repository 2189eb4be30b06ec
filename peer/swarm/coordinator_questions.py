"""What a round asks of the coordinator, by way of the daemon: a promise, or its half of a quorum.

An answer comes back as an event of the step that asked; one for a step long gone is dropped.
"""

import itertools
from collections.abc import Callable
from typing import Any

from peer.ipc import AsyncChannel
from peer.swarm import round_types as rt
from protos.muster.v1 import rounds_pb2

Place = tuple[int, int]
"""(incarnation, outer_step)."""
Post = Callable[[Place, rt.Event], None]

_MAX_OPEN = 64


class CoordinatorQuestions:
    """Questions that are not answered yet."""

    def __init__(self, channel: AsyncChannel, *, own_peer_id: str, post: Post) -> None:
        self._channel, self._own_peer_id, self._post = channel, own_peer_id, post
        self._numbers = itertools.count(1)
        self._asked: dict[str, tuple[Place, int | None]] = {}
        """request_id -> where it was asked, and in an exchange the attempt."""

    def ask(self, effect: rt.AskCoordinatorExchange | rt.SubmitVotes, place: Place) -> None:
        """Ask; the answer may never come."""
        incarnation, outer_step = place
        request_id = f"{self._own_peer_id}-{incarnation}-{outer_step}-{next(self._numbers)}"
        if len(self._asked) > _MAX_OPEN:
            self._asked.clear()
        request: rounds_pb2.CoordinatorExchangeRequest | rounds_pb2.SubmitVotesRequest
        if isinstance(effect, rt.AskCoordinatorExchange):
            method, attempt = "exchange", effect.attempt
            request = rounds_pb2.CoordinatorExchangeRequest(
                incarnation=incarnation, outer_step=outer_step, attempt=attempt
            )
            self._asked[request_id] = (place, attempt)
        else:
            method = "submit_votes"
            request = rounds_pb2.SubmitVotesRequest(
                request_id=request_id, votes=effect.votes, contributions=effect.contributions
            )
            self._asked[request_id] = (place, None)
        self._channel.send(
            "coordinator_request",
            request_id=request_id,
            method=method,
            request=request.SerializeToString(),
        )

    def answered(self, message: dict[str, Any]) -> None:
        """The daemon brings the coordinator's answer, or none."""
        found = self._asked.pop(message["request_id"], None)
        if found is None:
            return
        place, attempt = found
        data: bytes | None = message["response"]
        if attempt is None:
            voted = rounds_pb2.SubmitVotesResponse.FromString(data) if data is not None else None
            self._post(place, rt.CoordinatorVoted(voted))
        else:
            answer = (
                rounds_pb2.CoordinatorExchangeResponse.FromString(data)
                if data is not None
                else None
            )
            self._post(place, rt.CoordinatorExchanged(attempt, answer))
