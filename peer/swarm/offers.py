"""What the trainer brings, held until the round it was made for is under way."""

import asyncio
import logging
from typing import Any

from peer.ipc import Message
from peer.swarm import round_types as rt
from peer.swarm.codecs import EncodedVector
from peer.swarm.replica import Replica
from peer.swarm.reports import Reporter
from peer.swarm.round_shell import RoundShell
from protos.contract.errors import CorruptDataError
from protos.contract.telemetry import RoundOutcome
from protos.muster.v1 import common_pb2, rounds_pb2

logger = logging.getLogger(__name__)


class Offers:
    """Contribution or idleness of the own trainer."""

    def __init__(
        self, shell: RoundShell, replica: Replica, reporter: Reporter, *, own_peer_id: str
    ) -> None:
        self._shell, self._replica, self._reporter = shell, replica, reporter
        self._own_peer_id = own_peer_id
        self._pending: Message | None = None
        self._is_idle = False

    async def contribution(self, message: Message) -> None:
        """The trainer has announced a contribution."""
        self._pending = message
        await self._offer_contribution()

    async def idle(self, is_idle: bool) -> None:
        """The trainer has (no) work."""
        self._is_idle = is_idle
        await self._offer_idle()

    async def renew(self) -> None:
        """A round has begun: bring in what is held."""
        await self._offer_contribution()
        await self._offer_idle()

    async def _offer_contribution(self) -> None:
        message, shell = self._pending, self._shell
        if message is None or shell.machine is None or shell.checks is None:
            return
        self._pending = None
        base = (message["incarnation"], message["outer_step"])
        if base != self._replica.position:
            # The outcome that came with the newer state has said so; a second one would take the
            # trainer's next contribution for lost and let it overwrite what we have committed to.
            logger.debug("made for state %s, the state is %s", base, self._replica.position)
            return
        contribution = rounds_pb2.Contribution(
            peer_id=self._own_peer_id,
            ranges=[_leased_range(plain) for plain in message["ranges"]],
            loss_nats=message["loss_nats"],
        )
        verdict = shell.checks.check_contribution(contribution)
        problem = verdict.reason or ("" if verdict.num_tokens else "no tokens")
        if problem:
            self._refuse(problem)
            return
        try:
            encoded, digests = await asyncio.to_thread(self._encode)
        except CorruptDataError as error:
            self._refuse(str(error))
            return
        own = rt.OwnContribution(contribution=contribution, piece_digests=digests)
        reason = f"{verdict.num_tokens} tokens ready, waiting for the group"
        self._reporter.phase("FORM", reason)
        await shell.contribute(own, encoded)

    def _encode(self) -> tuple[EncodedVector, tuple[bytes, ...]]:
        replica = self._replica
        encoded = replica.encode_contribution()
        return encoded, encoded.digests()

    def _refuse(self, problem: str) -> None:
        reason = f"contribution not usable: {problem}"
        self._reporter.outcome(RoundOutcome.RESYNC, reason=reason)

    async def _offer_idle(self) -> None:
        """Without work a member still votes and reduces."""
        shell = self._shell
        if shell.machine is None:
            return
        has_work = shell.own is not None and len(shell.own.contribution.ranges) > 0
        if self._is_idle and shell.own is None:
            empty = rounds_pb2.Contribution(peer_id=self._own_peer_id)
            await shell.contribute(rt.OwnContribution(contribution=empty))
        elif not self._is_idle and shell.own is not None and not has_work:
            await shell.contribute(None)


def _leased_range(plain: dict[str, Any]) -> rounds_pb2.LeasedRange:
    return rounds_pb2.LeasedRange(
        lease=common_pb2.Signed.FromString(plain["lease"]),
        begin_window=plain["begin_window"],
        end_window=plain["end_window"],
    )
