"""Which state digests are proved, and what becomes of members' attestations.

State k is proved by certificate k+1 (its votes name it as previous state), by the record of an
incarnation that begins from it, or by attestations of more than half of the votes of the roster in
force then, or of the roster that certified step k: who decides an average also knows the state that
follows from it, and of a larger roster too many may be behind to attest anything. One difference
between two members, or between a member and a proof, is remembered for ever: `state_digests_equal`
is then false, with the place.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from coordinator.domain.incarnations import (
    Segment,
    chain_segments,
    is_attested_by_quorum,
    is_on_chain,
)
from coordinator.domain.membership import Member, after_attestation, after_refused_attestation
from coordinator.operations.common import OperationContext, load_book, load_directive, unix_ms
from coordinator.store.base import Transaction
from coordinator.store.rows import RunRow
from coordinator.store.rows_membership import AttestationRow, CheckpointRow
from protos.contract.certificate import Tag
from protos.contract.signing import has_valid_signature
from protos.muster.v1 import common_pb2, rounds_pb2

MAX_STEPS_AHEAD = 4096
"""How far beyond the newest certified step an attestation may be: members go on without a
coordinator.
"""
MAX_ATTESTATIONS_AHEAD = 64
"""Attestations of one peer kept beyond that step; the newest ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """Where the chain of states stands."""

    certified_outer_step: int
    certify_unix_seconds: float
    """When the newest certificate was stored, or the incarnation decided if that is later."""
    directive_number_in_force: int


def voters_of_directive(
    tx: Transaction, context: OperationContext, run_id: str, directive_number: int
) -> frozenset[str]:
    """Members with a vote under a directive."""
    directive = load_directive(tx, context, run_id, directive_number)
    roster = [] if directive is None else directive.roster
    return frozenset(entry.peer_id for entry in roster if entry.has_vote)


def directive_number_after(
    tx: Transaction, run_id: str, *, incarnation: int, outer_step: int
) -> int:
    """Directive in force once `outer_step` is committed in the incarnation, 0 if that is not
    known.
    """
    certificate = tx.certificate(run_id, incarnation, outer_step)
    if certificate is not None:
        return certificate.next_directive_number
    record = tx.incarnation(run_id, incarnation)
    if record is None or record.to_outer_step != outer_step:
        return 0
    signed = common_pb2.IncarnationRecord.FromString(record.payload).directive
    number: int = common_pb2.Directive.FromString(signed.payload).directive_number
    return number


def load_epoch(tx: Transaction, run: RunRow) -> Epoch:
    """The newest certified step of the chain in force."""
    record = tx.incarnation(run.run_id, run.incarnation)
    book = tx.book(run.run_id)
    assert record is not None and book is not None, "a run has a record and a book"
    outer_step = max(book.certified_outer_step, record.to_outer_step)
    certificate = tx.certificate(run.run_id, run.incarnation, outer_step)
    stored_unix_ms = certificate.store_unix_ms if certificate is not None else 0
    return Epoch(
        certified_outer_step=outer_step,
        certify_unix_seconds=max(stored_unix_ms, record.decide_unix_ms) / 1000,
        directive_number_in_force=directive_number_after(
            tx, run.run_id, incarnation=run.incarnation, outer_step=outer_step
        ),
    )


def load_segments(tx: Transaction, run_id: str) -> list[Segment]:
    """Segments of the chain in force, newest first."""
    records = tx.incarnations(run_id)
    return chain_segments([(r.incarnation, r.to_outer_step, r.base_incarnation) for r in records])


def certified_digest(
    tx: Transaction, run_id: str, *, incarnation: int, outer_step: int
) -> bytes | None:
    """Digest that a certificate or an incarnation's record names for the state, None if none
    does.
    """
    certificate = tx.certificate(run_id, incarnation, outer_step + 1)
    if certificate is not None:
        value = rounds_pb2.RoundValue.FromString(certificate.value)
        return bytes(value.previous_state_digest)
    for record in tx.incarnations(run_id):
        is_base = (record.base_incarnation, record.to_outer_step) == (incarnation, outer_step)
        if is_base and record.base_state_digest and record.incarnation != incarnation:
            return record.base_state_digest
    return None


def proved_digest(
    tx: Transaction, context: OperationContext, run_id: str, *, incarnation: int, outer_step: int
) -> bytes | None:
    """Digest that is proved for the state, None if nothing proves one."""
    certified = certified_digest(tx, run_id, incarnation=incarnation, outer_step=outer_step)
    if certified is not None:
        return certified
    attesters: dict[bytes, set[str]] = {}
    for row in tx.attestations(run_id, incarnation, outer_step):
        attesters.setdefault(row.state_digest, set()).add(row.peer_id)
    numbers = [directive_number_after(tx, run_id, incarnation=incarnation, outer_step=outer_step)]
    certificate = tx.certificate(run_id, incarnation, outer_step) if attesters else None
    if certificate is not None:
        value = rounds_pb2.RoundValue.FromString(certificate.value)
        numbers.append(value.roster_directive_number)
    for number in dict.fromkeys(numbers):
        voters = voters_of_directive(tx, context, run_id, number)
        for digest, peers in attesters.items():
            if is_attested_by_quorum(voters, frozenset(peers)):
                return digest
    return None


def proved_checkpoints(
    tx: Transaction, context: OperationContext, run_id: str
) -> list[CheckpointRow]:
    """Stored checkpoints of the chain in force whose digest is proved, newest step first."""
    segments = load_segments(tx, run_id)
    found = [
        row
        for row in tx.checkpoints(run_id)
        if is_on_chain(segments, incarnation=row.incarnation, outer_step=row.outer_step)
        and row.state_digest
        == proved_digest(
            tx, context, run_id, incarnation=row.incarnation, outer_step=row.outer_step
        )
    ]
    return sorted(found, key=lambda row: (row.outer_step, row.incarnation), reverse=True)


def take_attestations(
    tx: Transaction,
    context: OperationContext,
    run: RunRow,
    member: Member,
    public_key: bytes,
    attestations: Sequence[common_pb2.Signed],
    *,
    now_unix_seconds: float,
) -> Member:
    """Verify, store and compare attestations; returns the member after them. Those that cannot be
    used are left out.
    """
    newest = load_book(tx, run.run_id).certified_outer_step if attestations else 0
    for signed in attestations:
        try:
            attestation = common_pb2.Attestation.FromString(signed.payload)
        except DecodeError:
            continue
        is_own = (attestation.run_id, attestation.peer_id) == (run.run_id, member.peer_id)
        is_known = (
            attestation.incarnation <= run.incarnation
            and attestation.outer_step <= newest + MAX_STEPS_AHEAD
            and len(attestation.state_digest) == 32
        )
        if not (is_own and is_known):
            continue
        if not has_valid_signature(public_key, Tag.ATTESTATION, signed.payload, signed.signature):
            continue
        member = _take(
            tx, context, run, member, attestation, signed, now_unix_seconds=now_unix_seconds
        )
        if attestation.outer_step > newest + 1:
            tx.prune_attestations(
                run.run_id,
                attestation.incarnation,
                member.peer_id,
                above_outer_step=newest,
                keep=MAX_ATTESTATIONS_AHEAD,
            )
    return member


def _take(
    tx: Transaction,
    context: OperationContext,
    run: RunRow,
    member: Member,
    attestation: common_pb2.Attestation,
    signed: common_pb2.Signed,
    *,
    now_unix_seconds: float,
) -> Member:
    """Store one attestation and compare it with what is known of that state."""
    incarnation, outer_step = attestation.incarnation, attestation.outer_step
    digest = attestation.state_digest
    others = tx.attestations(run.run_id, incarnation, outer_step)
    proved = proved_digest(tx, context, run.run_id, incarnation=incarnation, outer_step=outer_step)
    own = next((row.state_digest for row in others if row.peer_id == member.peer_id), b"")
    if proved is None or proved != own:  # a word that helped to prove a state is not taken back
        tx.put_attestation(
            AttestationRow(
                run_id=run.run_id,
                incarnation=incarnation,
                outer_step=outer_step,
                peer_id=member.peer_id,
                state_digest=digest,
                payload=signed.payload,
                signature=signed.signature,
                receive_unix_ms=unix_ms(now_unix_seconds),
            )
        )
        proved = proved_digest(
            tx, context, run.run_id, incarnation=incarnation, outer_step=outer_step
        )
    if incarnation > 0 and any(row.state_digest != digest for row in others):
        place = f"outer step {outer_step} of incarnation {incarnation}"
        note_unequal(
            tx,
            run.run_id,
            f"{member.peer_id[:8]} attests another state of {place} than others",
            now_unix_seconds=now_unix_seconds,
        )
    if proved is not None and proved != digest:
        reason = (
            f"its state {digest.hex()[:12]} of outer step {outer_step} is not the proved"
            f" {proved.hex()[:12]}; it must resynchronise"
        )
        if incarnation > 0:
            note_unequal(
                tx, run.run_id, f"{member.peer_id[:8]}: {reason}", now_unix_seconds=now_unix_seconds
            )
        return after_refused_attestation(member, reason=reason)
    return after_attestation(
        member,
        incarnation=incarnation,
        outer_step=outer_step,
        state_digest=digest,
        current_incarnation=run.incarnation,
        certified_outer_step=load_book(tx, run.run_id).certified_outer_step,
    )


def unequal_reason(tx: Transaction, run_id: str) -> str:
    """Where members' states first differed, "" if they never did."""
    return tx.meta(f"unequal/{run_id}")


def note_unequal(tx: Transaction, run_id: str, reason: str, *, now_unix_seconds: float) -> None:
    """Remember for ever that members' states differed, and where first."""
    if not unequal_reason(tx, run_id):
        tx.set_meta(f"unequal/{run_id}", reason)
    tx.insert_event(
        run_id=run_id, unix_ms=unix_ms(now_unix_seconds), kind="unequal", peer_id="", text=reason
    )


def compare_with_certificates(tx: Transaction, run: RunRow, *, now_unix_seconds: float) -> None:
    """Compare the attestations of states that newly stored certificates prove; each step once."""
    book = tx.book(run.run_id)
    assert book is not None, "a run has a book"
    name = f"compared/{run.run_id}/{run.incarnation}"
    record = tx.incarnation(run.run_id, run.incarnation)
    begin = int(tx.meta(name) or (record.to_outer_step if record is not None else 0))
    end = book.certified_outer_step
    if end <= begin:
        return
    for outer_step in range(begin, end):
        proved = certified_digest(
            tx, run.run_id, incarnation=run.incarnation, outer_step=outer_step
        )
        for row in tx.attestations(run.run_id, run.incarnation, outer_step):
            if proved is not None and row.state_digest != proved:
                reason = (
                    f"{row.peer_id[:8]} attested {row.state_digest.hex()[:12]} for outer step"
                    f" {outer_step}, certificate {outer_step + 1} proves {proved.hex()[:12]}"
                )
                note_unequal(tx, run.run_id, reason, now_unix_seconds=now_unix_seconds)
    tx.set_meta(name, str(end))
