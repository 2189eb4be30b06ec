"""How a member gets to the newest state: certificates with averaged bytes, a proven snapshot, a
checkpoint, or the start.

Sources are tried from the cheapest to the dearest. The base of a new incarnation is looked for in
the own state, the own checkpoints, the initial state, the members, and last in what the daemon
fetched from the coordinator.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from google.protobuf.message import DecodeError

from peer.swarm.contribution_check import open_directive
from peer.swarm.incoming_state import IncomingState
from peer.swarm.piece_plan import PieceLayout
from peer.swarm.replica import Replica
from peer.swarm.state_download import Progress, StateDownload
from peer.swarm.state_transfer import (
    CertifiedStep,
    ProvenState,
    ask_state_info,
    fetch_averaged,
    is_resuming_cheaper,
    newest_proven_state,
    proves_state,
)
from peer.swarm.transport import Transport
from protos.contract.digest import StateMeta, num_pieces, state_digest_of_pieces
from protos.contract.errors import CorruptDataError
from protos.contract.ids import COORDINATOR_VOTER
from protos.contract.signing import check_certificate
from protos.muster.v1 import common_pb2, rounds_pb2, state_pb2

logger = logging.getLogger(__name__)

_MOST_PAUSE_SECONDS = 60.0
_MAX_TRIES = 3
"""Of downloading a state that its donors have left meanwhile."""
_MOST_DIRECTIVES = 256
"""Of one answer, whose signatures are checked: a donor shows one for each certificate it keeps."""
_MAX_PASSES = 16
"""Of asking members in a row; the swarm moves on while a state travels, but slower than this."""


class DownloadPause:
    """Keeps a member from downloading state after state while the swarm moves on faster than a
    state travels. Pure.

    A state is downloaded to go on from it by certificates and averaged bytes, which are less. If
    that did not work twice in a row, each further download waits twice as long as the one before.
    """

    def __init__(self) -> None:
        self._num_in_a_row = 0
        self._next_seconds = 0.0

    def downloaded(self, now_seconds: float) -> None:
        """A whole state is here."""
        self._num_in_a_row += 1
        if self._num_in_a_row > 1:
            pause_seconds = min(_MOST_PAUSE_SECONDS, 2.0 ** (self._num_in_a_row - 1))
            self._next_seconds = now_seconds + pause_seconds

    def step_made(self) -> None:
        """The state held was of use: a step was made from it."""
        self._num_in_a_row, self._next_seconds = 0, 0.0

    def left_seconds(self, now_seconds: float) -> float:
        """How long to wait before the next download."""
        return max(0.0, self._next_seconds - now_seconds)


class CatchUp:
    """Brings a replica forward; used by one task at a time."""

    def __init__(self, replica: Replica, transport: Transport, *, own_peer_id: str) -> None:
        self._replica, self._transport, self._own_peer_id = replica, transport, own_peer_id
        layout = PieceLayout(tuple(vector.size for vector in replica.vectors.state_vectors()))
        self._incoming = IncomingState(replica.store.folder, layout)
        self.on_progress: Callable[[str], None] = lambda _: None
        """Told how far a download is, for people."""
        self.stop = asyncio.Event()
        """Set it to end a download early."""
        self.newer_record: common_pb2.Signed | None = None
        """A record of a later incarnation that a member has shown."""
        self.problem = ""
        """Why the next certified step cannot be applied, for people; empty if it can."""
        self._pause = DownloadPause()

    def _others(self) -> list[str]:
        newest = common_pb2.Directive.FromString(self._replica.newest_directive().payload)
        return [e.peer_id for e in newest.roster if e.peer_id != self._own_peer_id]

    def _interrupted(self) -> tuple[state_pb2.SnapshotHeader, StateMeta] | None:
        """What an interrupted download was for, if that is ahead of the state held."""
        replica, header = self._replica, self._incoming.remembered()
        if header is None:
            return None
        try:
            meta = StateMeta.from_json(header.state_meta)
        except ValueError:
            return None
        is_ahead = not replica.is_current or meta.outer_step > replica.position[1]
        return (header, meta) if is_ahead and meta.incarnation == replica.incarnation else None

    async def infos(
        self, from_outer_step: int | None = None
    ) -> dict[str, state_pb2.StateInfoResponse]:
        """What the members hold, with certificates from a step on, else from the one after ours;
        learns their directives and notes records of later incarnations.
        """
        replica = self._replica
        if from_outer_step is None:
            from_outer_step = replica.position[1] + 1 if replica.is_current else 0
        request = state_pb2.StateInfoRequest(
            run_id=replica.run_id,
            incarnation=replica.incarnation,
            from_outer_step=from_outer_step,
        )
        infos = await ask_state_info(self._transport, self._others(), request)
        for info in infos.values():
            record = replica.open_record(info.incarnation_record)
            if record is not None and record.incarnation > replica.incarnation:
                self.newer_record = info.incarnation_record
            for signed in (info.directive, *info.directives[:_MOST_DIRECTIVES]):
                replica.learn_directive(signed)
        return infos

    async def forward(self) -> bool:
        """Towards the newest state of the incarnation, until members have nothing newer; True if
        the state has changed.
        """
        changed = False
        for _ in range(_MAX_PASSES):
            if self.stop.is_set() or not await self._pass():
                break
            changed = True
        if self._replica.is_current and self._interrupted() is None:
            self._incoming.discard()  # of a state that is not wanted any more
        return changed

    async def _pass(self) -> bool:
        """Ask members once and use what they have; True if the state has changed."""
        infos = await self.infos()
        if self.newer_record is not None:
            return False
        changed = False
        for peer_id, info in infos.items():
            try:
                for certificate in info.certificates:
                    if await self.apply_next(certificate, [peer_id, *self._others()]):
                        changed = True
            except DecodeError as error:
                logger.warning("%s sent a malformed certificate: %s", peer_id, error)
        interrupted = None if changed else self._interrupted()
        if interrupted is not None and await self._resume(*interrupted):
            return True
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
            await self.infos()
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
        self._pause.step_made()
        return True

    def _certified(self, infos: dict[str, state_pb2.StateInfoResponse]) -> dict[int, CertifiedStep]:
        """How the members' newest outer steps were certified, where that can be checked."""
        found: dict[int, CertifiedStep] = {}
        for peer_id, info in infos.items():
            try:
                value = rounds_pb2.RoundValue.FromString(info.newest_certificate.value)
            except DecodeError as error:
                logger.warning("%s sent a malformed certificate: %s", peer_id, error)
                continue
            signed = self._replica.directive_by_number.get(value.roster_directive_number)
            if signed is None:
                continue
            directive = common_pb2.Directive.FromString(signed.payload)
            is_present = value.incarnation == self._replica.incarnation
            if is_present and not check_certificate(
                info.newest_certificate,
                directive=directive,
                coordinator_public_key=self._replica.coordinator_public_key,
            ):
                voters = {vote.voter for vote in info.newest_certificate.votes}
                found[value.outer_step] = CertifiedStep(
                    directive=directive, has_coordinator=COORDINATOR_VOTER in voters
                )
        return found

    async def _load_proven(
        self, infos: dict[str, state_pb2.StateInfoResponse], *, after_outer_step: int = -1
    ) -> bool:
        """Download the newest proven state, later than an outer step, if it is newer than ours or
        contradicts it. The donors may make a step between their answer and the request: ask again.
        """
        tried: set[bytes] = set()
        while (proven := self._wanted_state(infos)) is not None and not self.stop.is_set():
            if proven.outer_step <= after_outer_step or proven.state_digest in tried:
                return False
            if await self._download(proven):
                self._pause.downloaded(time.monotonic())
                return True
            tried.add(proven.state_digest)
            infos = await self.infos() if len(tried) < _MAX_TRIES else {}
        return False

    def _wanted_state(self, infos: dict[str, state_pb2.StateInfoResponse]) -> ProvenState | None:
        """The newest proven state, if it is to be downloaded now."""
        replica = self._replica
        newest = common_pb2.Directive.FromString(replica.newest_directive().payload)
        proven = newest_proven_state(
            infos,
            run_id=replica.run_id,
            incarnation=replica.incarnation,
            directive=newest,
            own_peer_id=self._own_peer_id,
            base_outer_step=replica.record_content.to_outer_step,
            certified_by_step=self._certified(infos),
        )
        if proven is None:
            return None
        place = (proven.incarnation, proven.outer_step)
        same_place = replica.is_current and place == replica.position
        is_contradicted = same_place and proven.state_digest != replica.state_digest
        if replica.is_current and place <= replica.position and not is_contradicted:
            return None
        if (left_seconds := self._pause.left_seconds(time.monotonic())) > 0:
            self.problem = (
                f"the swarm is at outer step {proven.outer_step}, we hold {replica.position[1]}: "
                f"it moves on faster than a state travels here; next try in {left_seconds:.0f} s"
            )
            return None
        return proven

    async def _download(self, proven: ProvenState) -> bool:
        def tell(progress: Progress) -> None:
            share = f"{progress.num_held} of {progress.num_pieces} pieces"
            speed = f"{progress.bytes_per_second / 1e6:.1f} MB/s"
            self.on_progress(
                f"state {proven.incarnation}/{proven.outer_step}: {share} "
                f"from {progress.num_donors} members at {speed}"
            )

        download = StateDownload(
            self._transport,
            proven,
            incoming=self._incoming,
            check=self._problem_of_directive,
            stop=self.stop,
            on_progress=tell,
        )
        fetched = await download.run()
        if fetched is None:
            return False
        await asyncio.to_thread(
            self._replica.load, fetched.meta, fetched.vectors, fetched.directive, fetched.unreported
        )
        self._incoming.discard()
        return True

    def _problem_of_directive(self, meta: StateMeta, signed: common_pb2.Signed) -> str:
        """What is wrong with the directive that a donor shows with a state; "" if nothing."""
        replica, place = self._replica, f"{meta.incarnation}/{meta.outer_step}"
        try:
            incarnation = common_pb2.Directive.FromString(signed.payload).incarnation
        except DecodeError as error:
            return f"its directive does not parse ({error})"
        content = open_directive(
            signed,
            run_id=replica.run_id,
            incarnation=incarnation,
            coordinator_public_key=replica.coordinator_public_key,
        )
        is_own = incarnation == meta.incarnation  # a later one goes with the base it began from
        if content is None or not (is_own or meta.incarnation != replica.incarnation):
            return f"its directive for state {place} is not valid"
        if is_own and content.directive_number != meta.directive_number:
            return f"state {place} names another directive"
        return ""

    async def _resume(self, header: state_pb2.SnapshotHeader, meta: StateMeta) -> bool:
        """Finish an interrupted download if the certificate after it proves it and that is the
        cheaper way.
        """
        replica, layout = self._replica, self._incoming.layout
        digest = state_digest_of_pieces(meta, layout.by_vector(header.piece_digests))
        if self._problem_of_directive(meta, header.directive):
            return False
        directive = common_pb2.Directive.FromString(header.directive.payload)
        infos = await self.infos(from_outer_step=meta.outer_step + 1)
        ways = [list(info.certificates) for info in infos.values() if info.certificates]
        proofs = [
            way
            for way in ways
            if not check_certificate(
                way[0],
                directive=directive,
                coordinator_public_key=replica.coordinator_public_key,
            )
            and proves_state(way[0], meta, digest)
        ]
        if not proofs:
            return False
        num_missing = layout.num_pieces - await asyncio.to_thread(self._incoming.held, header)
        num_steps = max(len(way) for way in proofs)
        if not is_resuming_cheaper(
            num_missing=num_missing,
            num_pieces=layout.num_pieces,
            num_steps=num_steps,
            pieces_per_step=num_pieces(replica.contribution_values(meta.outer_step + 1)),
        ):
            return False
        logger.info(
            "going on with state %d/%d: %d pieces and %d steps are missing",
            meta.incarnation,
            meta.outer_step,
            num_missing,
            num_steps,
        )
        return await self._download(
            ProvenState(
                incarnation=meta.incarnation,
                outer_step=meta.outer_step,
                state_digest=digest,
                donors=tuple(self._others()),
            )
        )

    # Base of an incarnation -------------------------------------------------------------------

    async def rebase(self) -> bool:
        """Find the base of the current incarnation and become it, or a proven later state of it;
        False if nobody here has either.
        """
        replica, record = self._replica, self._replica.record_content
        if replica.rebase():
            return True
        wanted = f"{record.base_incarnation}-{record.to_outer_step}.safetensors"
        for path in [path for path in replica.store.paths() if path.name == wanted]:
            is_loaded = await asyncio.to_thread(replica.load_checkpoint_file, path)
            if is_loaded and replica.rebase():
                return True
        if await self._load_proven(await self.infos(), after_outer_step=record.to_outer_step):
            return replica.is_current  # a newcomer: the swarm has left the base behind
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
