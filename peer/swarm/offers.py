"""What the trainer brings, held until the round it was made for is under way.

Each contribution has a number and gets one verdict, which names it: what a step without it has
become may be on its way to the trainer while the trainer, which reads the state in shared memory,
has already offered the next one.
"""

import asyncio
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


class Offers:
    """Contribution or idleness of the own trainer."""

    def __init__(
        self, shell: RoundShell, replica: Replica, reporter: Reporter, *, own_peer_id: str
    ) -> None:
        self._shell, self._replica, self._reporter = shell, replica, reporter
        self._own_peer_id = own_peer_id
        self._pending: Message | None = None
        self._is_idle = False
        self._number = 0

    def take_number(self) -> int:
        """Number of the contribution that has had no verdict, for the verdict that is told now;
        0 if there is none. What is held of it is forgotten.
        """
        number, self._number, self._pending = self._number, 0, None
        return number

    def lost(self, reason: str) -> None:
        """Tell that the contribution, and whatever was trained on another state, is lost."""
        number = self.take_number()
        self._reporter.outcome(RoundOutcome.RESYNC, reason=reason, offer_number=number)

    async def contribution(self, message: Message) -> None:
        """The trainer has announced a contribution."""
        self._pending, self._number = message, message["offer_number"]
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
            self._refuse(f"made for state {base}, the state is {self._replica.position}")
            return
        if message["state_digest"] != self._replica.state_digest:
            self._refuse(f"made for another state {base} than the one that replaced it")
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
        self.lost(f"contribution not usable: {problem}")

    async def _offer_idle(self) -> None:
        """Without work a member still votes and reduces."""
        shell = self._shell
        if shell.machine is None:
            return
        if self._is_idle and shell.own is None:
            empty = rounds_pb2.Contribution(peer_id=self._own_peer_id)
            await shell.contribute(rt.OwnContribution(contribution=empty))
        elif not self._is_idle and shell.own is not None and not shell.has_work:
            await shell.contribute(None)


def _leased_range(plain: dict[str, Any]) -> rounds_pb2.LeasedRange:
    return rounds_pb2.LeasedRange(
        lease=common_pb2.Signed.FromString(plain["lease"]),
        begin_window=plain["begin_window"],
        end_window=plain["end_window"],
    )
