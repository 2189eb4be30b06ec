"""How a member gets to the newest state: certificates with averaged bytes, a proven snapshot, a
checkpoint, or the start.

Sources are tried from the cheapest to the dearest. The base of a new incarnation is looked for in
the own state, the own checkpoints, the initial state, the members, and last in what the daemon
fetched from the coordinator.
"""

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path

from google.protobuf.message import DecodeError

from peer.swarm.contribution_check import open_directive
from peer.swarm.replica import Replica
from peer.swarm.state_transfer import (
    ProvenState,
    StateDownload,
    ask_state_info,
    fetch_averaged,
    newest_proven_state,
)
from peer.swarm.transport import Transport
from protos.contract.digest import StateMeta
from protos.contract.errors import CorruptDataError
from protos.contract.signing import check_certificate
from protos.muster.v1 import common_pb2, rounds_pb2, state_pb2

logger = logging.getLogger(__name__)


class CatchUp:
    """Brings a replica forward; used by one task at a time."""

    def __init__(self, replica: Replica, transport: Transport, *, own_peer_id: str) -> None:
        self._replica, self._transport, self._own_peer_id = replica, transport, own_peer_id
        self.newer_record: common_pb2.Signed | None = None
        """A record of a later incarnation that a member has shown."""
        self.problem = ""
        """Why the next certified step cannot be applied, for people; empty if it can."""

    def _others(self) -> list[str]:
        newest = common_pb2.Directive.FromString(self._replica.newest_directive().payload)
        return [e.peer_id for e in newest.roster if e.peer_id != self._own_peer_id]

    async def infos(self) -> dict[str, state_pb2.StateInfoResponse]:
        """What the members hold; notes records of later incarnations."""
        replica = self._replica
        request = state_pb2.StateInfoRequest(
            run_id=replica.run_id,
            incarnation=replica.incarnation,
            from_outer_step=replica.position[1] + 1 if replica.is_current else 0,
        )
        infos = await ask_state_info(self._transport, self._others(), request)
        for info in infos.values():
            record = replica.open_record(info.incarnation_record)
            if record is not None and record.incarnation > replica.incarnation:
                self.newer_record = info.incarnation_record
        return infos

    async def forward(self) -> bool:
        """One pass towards the newest state of the incarnation; True if the state has changed."""
        replica = self._replica
        infos = await self.infos()
        if self.newer_record is not None:
            return False
        changed = False
        for info in infos.values():
            for signed in (info.directive, *info.directives):
                replica.learn_directive(signed)
        for peer_id, info in infos.items():
            try:
                for certificate in info.certificates:
                    if await self.apply_next(certificate, [peer_id, *self._others()]):
                        changed = True
            except DecodeError as error:
                logger.warning("%s sent a malformed certificate: %s", peer_id, error)
        return await self._load_proven(infos) or changed

    async def apply_next(self, certificate: rounds_pb2.Certificate, holders: Iterable[str]) -> bool:
        """Apply the next certificate with bytes from a holder, if it is the next and all is
        proven.
        """
        replica, meta = self._replica, self._replica.meta
        value = rounds_pb2.RoundValue.FromString(certificate.value)
        if meta is None or not replica.is_current or value.outer_step != meta.outer_step + 1:
            return False
        problem = check_certificate(
            certificate,
            directive=replica.directive_in_force(),
            coordinator_public_key=replica.coordinator_public_key,
        )
        if problem or value.previous_state_digest != replica.state_digest:
            logger.info(
                "certificate %d: %s", value.outer_step, problem or "continues another state"
            )
            return False
        return await self.apply_certificate(certificate, holders)

    async def apply_certificate(
        self, certificate: rounds_pb2.Certificate, holders: Iterable[str]
    ) -> bool:
        """Apply a checked certificate; False if its bytes or its directive cannot be had now."""
        replica = self._replica
        value = rounds_pb2.RoundValue.FromString(certificate.value)
        averaged = replica.averaged(value.averaged_digest)
        if averaged is None:
            wanted = [peer for peer in dict.fromkeys(holders) if peer != self._own_peer_id]
            averaged = await fetch_averaged(
                self._transport,
                wanted,
                value.averaged_digest,
                codec_name=replica.codec.name,
                num_values=replica.contribution_values(value.outer_step),
            )
            if averaged is None:
                return False
            await asyncio.to_thread(replica.hold_averaged, averaged)
        if value.next_directive_number not in replica.directive_by_number:
            for info in (await self.infos()).values():
                for signed in (info.directive, *info.directives):
                    replica.learn_directive(signed)
        directive = replica.directive_by_number.get(value.next_directive_number)
        if directive is None:
            return False
        try:
            await asyncio.to_thread(replica.apply, certificate, averaged, directive)
        except (
            CorruptDataError
        ) as error:  # the state is untouched; others may have gone another way
            self.problem = f"outer step {value.outer_step} cannot be applied: {error}"
            logger.warning("%s", self.problem)
            return False
        self.problem = ""
        return True

    async def _load_proven(self, infos: dict[str, state_pb2.StateInfoResponse]) -> bool:
        """Download the newest proven state if it is newer than ours, or contradicts it."""
        replica = self._replica
        newest = common_pb2.Directive.FromString(replica.newest_directive().payload)
        proven = newest_proven_state(
            infos,
            run_id=replica.run_id,
            incarnation=replica.incarnation,
            directive=newest,
            own_peer_id=self._own_peer_id,
        )
        if proven is None:
            return False
        place = (proven.incarnation, proven.outer_step)
        same_place = replica.is_current and place == replica.position
        is_contradicted = same_place and proven.state_digest != replica.state_digest
        if replica.is_current and place <= replica.position and not is_contradicted:
            return False
        return await self._download(proven)

    async def _download(self, proven: ProvenState) -> bool:
        vectors = self._replica.vectors
        download = StateDownload(
            self._transport,
            proven,
            num_values=vectors.num_values,
            num_vectors=len(vectors.state_vectors()),
        )
        fetched = await download.run()
        if fetched is None:
            return False
        meta, directive = fetched.meta, fetched.directive
        content = open_directive(
            directive,
            run_id=self._replica.run_id,
            incarnation=meta.incarnation,
            coordinator_public_key=self._replica.coordinator_public_key,
        )
        if content is None and meta.incarnation == self._replica.incarnation:
            logger.info("snapshot %d/%d: directive not valid", meta.incarnation, meta.outer_step)
            return False
        if content is not None and content.directive_number != meta.directive_number:
            logger.info("snapshot %d/%d names another directive", meta.incarnation, meta.outer_step)
            return False
        await asyncio.to_thread(
            self._replica.load, meta, fetched.vectors, directive, fetched.unreported
        )
        return True

    # Base of an incarnation -------------------------------------------------------------------

    async def rebase(self) -> bool:
        """Find the base of the current incarnation and become it; False if nobody here has it."""
        replica, record = self._replica, self._replica.record_content
        if replica.rebase():
            return True
        wanted = f"{record.base_incarnation}-{record.to_outer_step}.safetensors"
        for path in [path for path in replica.store.paths() if path.name == wanted]:
            is_loaded = await asyncio.to_thread(replica.load_checkpoint_file, path)
            if is_loaded and replica.rebase():
                return True
        if record.to_outer_step == 0:
            is_built = await asyncio.to_thread(replica.build_initial)
            if is_built and replica.rebase():
                return True
        base = ProvenState(
            incarnation=record.base_incarnation,
            outer_step=record.to_outer_step,
            state_digest=record.base_state_digest,
            donors=tuple(self._others()),
        )
        if await self._download(base) and replica.rebase():
            return True
        return await self._load_proven(await self.infos()) and replica.is_current

    async def take_checkpoint(self, path: str) -> bool:
        """Use a checkpoint that the daemon fetched from the coordinator, which verified and signed
        for it.
        """
        replica = self._replica
        is_loaded = await asyncio.to_thread(
            replica.load_checkpoint_file, Path(path), is_wanted=self._is_of_use
        )
        return is_loaded and (replica.is_current or replica.rebase())

    def _is_of_use(self, meta: StateMeta) -> bool:
        """True for the base of an incarnation still without state, or a state ahead of ours in
        it.
        """
        replica, record = self._replica, self._replica.record_content
        place = (meta.incarnation, meta.outer_step)
        if replica.is_current:
            return meta.incarnation == replica.incarnation and place > replica.position
        base = (record.base_incarnation, record.to_outer_step)
        return meta.incarnation == replica.incarnation or place == base
