"""This member's copy of the replicated state: vectors in shared memory, their bookkeeping, and the
proofs around them.

Only this object writes the state, always through `SharedVectors.writing_state`. It changes in three
ways: the exact update of a certified step, a whole state loaded after its digest was checked, and a
new incarnation of the state it holds (same vectors, new bookkeeping, digest recomputed). No network
and no clock here.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError

from peer.checkpoint.initial import imported_model_path, initial_params
from peer.checkpoint.store import CheckpointHeader, CheckpointStore, open_checkpoint
from peer.shared_vectors import SharedVectors
from peer.swarm.allreduce import AveragedVector
from peer.swarm.averaged_store import AveragedStore
from peer.swarm.codecs import EncodedVector
from peer.swarm.contribution_check import next_meta, open_directive, position_of
from peer.swarm.error_feedback import ErrorFeedback
from peer.swarm.foreign_certificates import ForeignCertificates, place_of
from peer.swarm.fragments import FragmentPlan
from peer.swarm.outer_update import exact_update_for
from peer.swarm.record_file import run_folder_name
from protos.contract.certificate import Tag
from protos.contract.codecs_wire import codec_named
from protos.contract.digest import (
    Float32Vector,
    StateMeta,
    state_digest_of_pieces,
    state_piece_digests,
)
from protos.contract.errors import CorruptDataError, MachineError
from protos.contract.run_spec import RunSpec
from protos.contract.signing import SigningKey, has_valid_signature
from protos.muster.v1 import common_pb2, rounds_pb2

logger = logging.getLogger(__name__)

_NUM_KEPT_CERTIFICATES = 64
_NUM_ATTESTED = 2
"""States that a member says it reached, newest first: members are seldom at the same step at the
same moment.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A state as members download it; state_image.py makes an immutable copy of it."""

    meta: StateMeta
    state_digest: bytes
    vectors: tuple[Float32Vector, ...]
    piece_digests: tuple[tuple[bytes, ...], ...]
    directive: common_pb2.Signed
    is_live: bool
    """The vectors are those of this member and change with its next step."""


class Replica:
    """The replicated state of one member; `meta` is None until it holds one."""

    def __init__(
        self,
        *,
        spec: RunSpec,
        run_id: str,
        key: SigningKey,
        coordinator_public_key: bytes,
        vectors: SharedVectors,
        folder: Path,
    ) -> None:
        """Nothing is loaded yet; `folder` is the peer's home, which may hold other runs as well."""
        self.spec, self.run_id = spec, run_id
        self.coordinator_public_key = coordinator_public_key
        self.seq_len = spec.model.seq_len
        self.codec = codec_named(spec.strategy.codec)
        """How contributions travel."""
        self.vectors = vectors
        self._imported_path = imported_model_path(folder, spec)
        run_folder = run_folder_name(run_id, coordinator_public_key)
        self.store = CheckpointStore(folder / "state" / run_folder)
        averaged_folder = folder / "averaged" / run_folder
        self.averages = AveragedStore(averaged_folder, codec_name=spec.strategy.codec)
        self._key = key
        self._update = exact_update_for(spec)
        self._plan = FragmentPlan(spec)
        self.feedback = ErrorFeedback(self.codec, num_values=vectors.num_values)
        self.meta: StateMeta | None = None
        self.state_digest = b""
        self.directive: common_pb2.Signed | None = None
        """In force for the next outer step."""
        self.record: common_pb2.Signed | None = None
        self.record_content = common_pb2.IncarnationRecord()
        self.unreported: list[rounds_pb2.Certificate] = []
        self.directive_by_number: dict[int, common_pb2.Signed] = {}
        self.certificate_by_step: OrderedDict[int, rounds_pb2.Certificate] = OrderedDict()
        self._foreign = ForeignCertificates(
            run_id=run_id,
            coordinator_public_key=coordinator_public_key,
            directive_by_number=self.directive_by_number,
        )
        self._piece_digests: tuple[tuple[bytes, ...], ...] = ()
        self.recent_directives: list[common_pb2.Signed] = []
        """In force now, and for the last step made here: its members may still fetch that step's
        bytes.
        """
        self._base_meta: StateMeta | None = None
        self._base_digest = b""
        self._attestations: list[common_pb2.Signed] = []

    # Directives and records -------------------------------------------------------------------

    @property
    def incarnation(self) -> int:
        """Current incarnation, by the newest record, whether or not its base is held yet."""
        return int(self.record_content.incarnation)

    @property
    def position(self) -> tuple[int, int]:
        """(incarnation, committed outer steps) of the state held; (-1, -1) without one."""
        return (-1, -1) if self.meta is None else (self.meta.incarnation, self.meta.outer_step)

    def open_record(self, signed: common_pb2.Signed) -> common_pb2.IncarnationRecord | None:
        """Content of an incarnation record that the coordinator signed for this run."""
        if not has_valid_signature(
            self.coordinator_public_key, Tag.INCARNATION, signed.payload, signed.signature
        ):
            return None
        record = common_pb2.IncarnationRecord.FromString(signed.payload)
        return record if record.run_id == self.run_id else None

    def learn_directive(self, signed: common_pb2.Signed) -> common_pb2.Directive | None:
        """Keep a directive of the current incarnation."""
        directive = open_directive(
            signed,
            run_id=self.run_id,
            incarnation=self.incarnation,
            coordinator_public_key=self.coordinator_public_key,
        )
        if directive is not None:
            self.directive_by_number[directive.directive_number] = signed
            self._prove_own_step()
        return directive

    def newest_directive(self) -> common_pb2.Signed:
        """Newest directive known in this incarnation."""
        return self.directive_by_number[max(self.directive_by_number)]

    def directive_in_force(self) -> common_pb2.Directive:
        """Content of the directive in force for the next outer step."""
        assert self.directive is not None
        directive: common_pb2.Directive = common_pb2.Directive.FromString(self.directive.payload)
        return directive

    def enter_incarnation(self, signed: common_pb2.Signed) -> None:
        """Take a newer record: what belonged to older incarnations is dropped, the state is not
        trusted yet.
        """
        record = self.open_record(signed)
        assert record is not None and (self.record is None or record.incarnation > self.incarnation)
        self.record, self.record_content = signed, record
        self.directive_by_number.clear()
        self.certificate_by_step.clear()
        self.recent_directives.clear()
        self._foreign.unproven.clear()
        self.learn_directive(record.directive)

    # State ------------------------------------------------------------------------------------

    def rebase(self) -> bool:
        """Make the held state the base of the current incarnation, if it is that base; True if
        so.
        """
        record, meta = self.record_content, self.meta
        if meta is None or meta.outer_step != record.to_outer_step:
            return False
        is_base = meta.incarnation == record.base_incarnation and (
            self.state_digest == record.base_state_digest or not record.base_state_digest
        )
        if record.to_outer_step == 0 and record.base_incarnation > 0:
            is_base = meta.incarnation == 0  # the initial state is a function of the spec
        if not is_base or meta.incarnation > record.incarnation:
            return False
        directive = common_pb2.Directive.FromString(record.directive.payload)
        self._base_meta, self._base_digest = meta, self.state_digest
        after = replace(
            meta,
            incarnation=record.incarnation,
            directive_number=directive.directive_number,
            lease_cursor_by_peer={},
        )
        self._publish(after, record.directive)
        return True

    def build_initial(self) -> bool:
        """Become the initial state of incarnation 0; False while its file is on its way."""
        if self._imported_path is not None and not self._imported_path.is_file():
            return False
        first = self.record_content.directive
        content = common_pb2.Directive.FromString(first.payload)
        number = 1 if self.incarnation > 0 else content.directive_number
        meta = StateMeta(
            run_digest=self.spec.run_digest,
            incarnation=0,
            outer_step=0,
            schedule_tokens=0,
            directive_number=number,
        )
        params, *moments = self.vectors.state_vectors()

        def write() -> None:
            np.copyto(params, initial_params(self.spec, self._imported_path))
            for moment in moments:
                moment.fill(0.0)

        self._publish(meta, first, write)
        return True

    def apply(
        self,
        certificate: rounds_pb2.Certificate,
        averaged: AveragedVector,
        next_directive: common_pb2.Signed,
    ) -> None:
        """Make a certified step: exact update, bookkeeping, digest. The caller has checked the
        certificate.
        """
        meta = self.meta
        value = rounds_pb2.RoundValue.FromString(certificate.value)
        assert meta is not None and value.outer_step == meta.outer_step + 1
        assert value.previous_state_digest == self.state_digest
        assert value.averaged_digest == averaged.averaged_digest
        before, in_force = self.directive, self.directive_in_force()
        after = next_meta(meta, certificate, seq_len=self.seq_len)
        gradient = averaged.encoded.decoded()

        def write() -> None:
            self._update.apply(
                *self.vectors.state_vectors(),
                gradient,
                update_number=after.outer_step,
                schedule_tokens=meta.schedule_tokens,
                cooldown_start_tokens=in_force.cooldown_start_tokens,
                budget_tokens=in_force.budget_tokens,
            )
            self.keep_certificate(certificate)
            self.unreported.append(certificate)

        self._publish(after, next_directive, write)
        if before is not None and before != next_directive:
            self.recent_directives.append(before)

    def load(
        self,
        meta: StateMeta,
        vectors: Sequence[Float32Vector],
        directive: common_pb2.Signed,
        unreported: Iterable[rounds_pb2.Certificate] = (),
    ) -> None:
        """Become a state whose digest the caller has proven, with certificates to check."""
        self.learn_directive(directive)
        usable = self._foreign.usable(unreported)
        self._attestations = []  # of another way to this state or an earlier one
        held = {certificate.value for certificate in self.unreported}

        def write() -> None:
            for target, source in zip(self.vectors.state_vectors(), vectors, strict=True):
                np.copyto(target, source)
            self.unreported.extend(c for c in usable if c.value not in held)

        self._publish(meta, directive, write)
        if self.is_current:
            self._foreign.unproven = [c for c in usable if place_of(c) == self.position]
            self._prove_own_step()

    def _prove_own_step(self) -> None:
        for certificate in self._foreign.take_proven():
            self.keep_certificate(certificate)

    def _publish(
        self,
        meta: StateMeta,
        directive: common_pb2.Signed,
        write: Callable[[], None] | None = None,
    ) -> None:
        """Become a state; readers see its vectors, if `write` changes them, with its digest."""
        with self.vectors.writing_state(position_of(meta, directive)) as change:
            if write is not None:
                write()
                self._piece_digests = state_piece_digests(self.vectors.state_vectors())
            self.meta, self.directive = meta, directive
            self.state_digest = state_digest_of_pieces(meta, self._piece_digests)
            change.position = replace(change.position, state_digest=self.state_digest)
        self._foreign.unproven = []
        self.learn_directive(directive)
        self.recent_directives = [directive] if self.is_current else []
        attestation = common_pb2.Attestation(
            run_id=self.run_id,
            incarnation=meta.incarnation,
            outer_step=meta.outer_step,
            state_digest=self.state_digest,
            peer_id=self._key.peer_id,
        )
        signed = self._key.signed(Tag.ATTESTATION, attestation.SerializeToString())
        self._attestations = [signed, *self._attestations[: _NUM_ATTESTED - 1]]
        oldest = meta.outer_step - _NUM_KEPT_CERTIFICATES
        for step in [s for s in self.certificate_by_step if s <= oldest]:
            del self.certificate_by_step[step]
        for number in [n for n in self.directive_by_number if n < meta.directive_number - 64]:
            del self.directive_by_number[number]

    @property
    def attestation(self) -> common_pb2.Signed:
        """Own signed statement about the state held."""
        return self._attestations[0]

    def contribution_values(self, outer_step: int) -> int:
        """Length of the vectors that are averaged in an outer step (from 1)."""
        return self._plan.of_outer_step(outer_step).num_values

    @property
    def contribution(self) -> Float32Vector:
        """What the own trainer brings into the round after the state held."""
        assert self.meta is not None
        return self.vectors.contribution[: self.contribution_values(self.meta.outer_step + 1)]

    def encode_contribution(self) -> EncodedVector:
        """The same as it travels. Raises CorruptDataError for values that are not finite."""
        fragment = self._plan.of_outer_step(self.position[1] + 1)
        return self.feedback.encode(fragment, self.contribution, place=self.position)

    @property
    def is_current(self) -> bool:
        """True if a state of the current incarnation is held; only then may it be attested or
        served.
        """
        return self.meta is not None and self.meta.incarnation == self.incarnation

    # Proofs and bytes -------------------------------------------------------------------------

    def keep_certificate(self, certificate: rounds_pb2.Certificate) -> None:
        """Remember a certificate for laggards."""
        self.certificate_by_step[place_of(certificate)[1]] = certificate

    def acknowledge(self, *, incarnation: int, up_to_outer_step: int) -> None:
        """The coordinator has stored these certificates."""
        self.unreported = [
            c
            for c in self.unreported
            if (place := place_of(c))[0] != incarnation or place[1] > up_to_outer_step
        ]

    def hold_averaged(self, averaged: AveragedVector) -> None:
        """Keep averaged bytes of the last steps, also across a restart of this process. Raises
        MachineError: without the bytes on disk there must be no vote.
        """
        try:
            self.averages.hold(averaged)
        except OSError as error:
            raise MachineError(
                f"averaged bytes cannot be written: {error}",
                allowed="room for them in the peer's home",
                remedy="free space there, or move the peer with --home",
            ) from error

    def held_digests(self) -> tuple[bytes, ...]:
        """Digests of the averaged bytes held."""
        return self.averages.digests

    def averaged(self, averaged_digest: bytes) -> AveragedVector | None:
        """Averaged bytes, if they are held."""
        return self.averages.find(averaged_digest)

    def state_info(
        self, *, from_outer_step: int
    ) -> tuple[list[common_pb2.Signed], list[rounds_pb2.Certificate], list[common_pb2.Signed]]:
        """Attestations, and certificates with directives from a step on whose averaged bytes are
        held.
        """
        certificates: list[rounds_pb2.Certificate] = []
        directives: list[common_pb2.Signed] = []
        step = from_outer_step
        while (certificate := self.certificate_by_step.get(step)) is not None:
            value = rounds_pb2.RoundValue.FromString(certificate.value)
            signed = self.directive_by_number.get(value.next_directive_number)
            if value.averaged_digest not in self.averages.digests or signed is None:
                break
            certificates.append(certificate)
            directives.append(signed)
            step += 1
        attestations = self._attestations[:_NUM_ATTESTED] if self.is_current else []
        return attestations, certificates, directives

    def snapshot(self, *, incarnation: int, outer_step: int) -> Snapshot | None:
        """State at a position: the current one, the base that it was made from, or a checkpoint."""
        meta, directive = self.meta, self.directive
        if meta is not None and directive is not None and meta.outer_step == outer_step:
            base = self._base_meta
            is_base = (
                base is not None
                and (base.incarnation, base.outer_step) == (incarnation, outer_step)
                and meta.incarnation == self.incarnation
                and self.record_content.to_outer_step == outer_step
            )
            if meta.incarnation == incarnation or is_base:
                return Snapshot(
                    meta=base if is_base and base is not None else meta,
                    state_digest=self._base_digest if is_base else self.state_digest,
                    vectors=self.vectors.state_vectors(),
                    piece_digests=self._piece_digests,
                    directive=directive,
                    is_live=True,
                )
        return self._snapshot_on_disk(incarnation=incarnation, outer_step=outer_step)

    def _snapshot_on_disk(self, *, incarnation: int, outer_step: int) -> Snapshot | None:
        name = f"{incarnation}-{outer_step}.safetensors"
        path = self.store.folder / name
        if not path.exists():
            return None
        try:
            header, vectors = open_checkpoint(path)
        except CorruptDataError as error:
            logger.warning("checkpoint is of no use: %s", error)
            return None
        return Snapshot(
            meta=header.meta,
            state_digest=header.state_digest,
            vectors=vectors,
            piece_digests=state_piece_digests(vectors),
            directive=common_pb2.Signed.FromString(header.directive),
            is_live=False,
        )

    def steady_sequence(self) -> int | None:
        """Changes when the state does; None while vectors and bookkeeping are not of one state."""
        sequence, meta, held = self.vectors.sequence, self.meta, self.vectors.position()
        is_one = meta is not None and self.position == (held.incarnation, held.outer_step)
        return sequence if is_one and sequence % 2 == 0 else None

    # Checkpoints ------------------------------------------------------------------------------

    def checkpoint_header(self) -> CheckpointHeader:
        """Header of a checkpoint of the state held."""
        assert self.meta is not None and self.directive is not None and self.record is not None
        certificates = self.carried_certificates()
        return CheckpointHeader(
            meta=self.meta,
            state_digest=self.state_digest,
            directive=self.directive.SerializeToString(),
            incarnation_record=self.record.SerializeToString(),
            unreported_certificates=tuple(c.SerializeToString() for c in certificates),
        )

    def carried_certificates(self) -> list[rounds_pb2.Certificate]:
        """What goes with the state wherever it goes: what the coordinator has not acknowledged, and
        the certificate of its own step, by which others believe that the step has happened.
        """
        own = self.certificate_by_step.get(self.position[1]) if self.is_current else None
        held = {certificate.value for certificate in self.unreported}
        of_own_step = self._foreign.unproven if own is None else [own]
        return [*self.unreported, *(c for c in of_own_step if c.value not in held)]

    def save_local(self) -> None:
        """Write a checkpoint of the state held into the own home, and the private residual."""
        self.store.save(self.checkpoint_header(), self.vectors.state_vectors())
        self.feedback.save(self.store.folder, self.position)

    def load_checkpoint_file(
        self, path: Path, *, is_wanted: Callable[[StateMeta], bool] | None = None
    ) -> bool:
        """Become the state of a checkpoint of this run; False, with nothing changed, if it cannot
        be used.
        """
        try:
            header, vectors = open_checkpoint(path)
            directive = common_pb2.Signed.FromString(header.directive)
            common_pb2.Directive.FromString(directive.payload)
            certificates = header.unreported_certificates
            unreported = [rounds_pb2.Certificate.FromString(data) for data in certificates]
        except (CorruptDataError, OSError, DecodeError) as error:
            logger.warning("checkpoint %s is of no use: %s", path.name, error)
            return False
        if header.meta.run_digest != self.spec.run_digest:
            return False
        if is_wanted is not None and not is_wanted(header.meta):
            return False
        if vectors[0].size != self.vectors.num_values:
            return False
        self.load(header.meta, vectors, directive, unreported)
        self.feedback.load(self.store.folder, self.position)
        return True
