"""Finds own signatures of which the store has no record, and keeps what they tell (domain/store_age
says what follows).

Two things are looked at in every certificate that cannot simply be confirmed: the coordinator's
half vote, which it gives only in the transaction that stores the certificate, and its leases, which
it stores before it hands them out. Neither is ever removed from a store.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, replace

from coordinator.domain.incarnations import Holding
from coordinator.domain.store_age import SignedBeyond, merged, stall_reason
from coordinator.operations.common import OperationContext, unix_ms
from coordinator.operations.round_check import parsed_contributions
from coordinator.store.base import Transaction
from coordinator.store.rows import RunRow
from protos.contract.certificate import Tag
from protos.contract.ids import COORDINATOR_VOTER
from protos.contract.signing import has_valid_signature, is_valid_vote
from protos.muster.v1 import common_pb2, rounds_pb2

MAX_CHECKED_LEASES = 64
"""Leases of one certificate whose signature is looked at; one is enough."""


def load_beyond(tx: Transaction, run: RunRow) -> SignedBeyond | None:
    """What is known to be signed beyond the store, if that matters in the incarnation in force."""
    text = tx.meta(_key(run.run_id))
    if not text:
        return None
    beyond = SignedBeyond(**json.loads(text))
    return beyond if beyond.applies_to(run.incarnation) else None


def _key(run_id: str) -> str:
    return f"older_store/{run_id}"


def note_signed_beyond(
    tx: Transaction,
    context: OperationContext,
    run: RunRow,
    certificate: rounds_pb2.Certificate,
    value: rounds_pb2.RoundValue,
    *,
    now_unix_seconds: float,
) -> SignedBeyond | None:
    """Remember, and say in the event log, that this certificate holds an own signature that the
    store does not know; returns all that is known of that kind.

    Call it before anything of the certificate is stored. Votes alone come as a certificate too.
    """
    known = load_beyond(tx, run)
    if known is not None and known.outer_step >= value.outer_step:
        return known
    reason = _unknown_half_vote(tx, context, certificate, value) or _unknown_lease(
        tx, context, certificate, value
    )
    if not reason:
        return known
    found = SignedBeyond(
        incarnation=value.incarnation,
        outer_step=value.outer_step,
        directive_number=max(value.roster_directive_number, value.next_directive_number),
        detect_unix_seconds=now_unix_seconds,
        reason=f"the store is older than what this coordinator has signed: {reason}",
    )
    beyond = merged(known, found)
    tx.set_meta(_key(run.run_id), json.dumps(asdict(beyond)))
    if known is None:
        tx.insert_event(
            run_id=run.run_id,
            unix_ms=unix_ms(now_unix_seconds),
            kind="older_store",
            peer_id="",
            text=f"{beyond.reason}; no half vote until a new incarnation begins",
        )
    return beyond


def _unknown_half_vote(
    tx: Transaction,
    context: OperationContext,
    certificate: rounds_pb2.Certificate,
    value: rounds_pb2.RoundValue,
) -> str:
    """Sentence about the own half in the certificate; "" if there is none or it is recorded."""
    if tx.certificate(value.run_id, value.incarnation, value.outer_step) is not None:
        return ""
    for signed in certificate.votes:
        if signed.voter != COORDINATOR_VOTER:
            continue
        vote = rounds_pb2.Vote(
            value=certificate.value, attempt=certificate.attempt, signature=signed.signature
        )
        if is_valid_vote(vote, context.signing_key.public_key):
            return (
                f"its own half vote for outer step {value.outer_step} of incarnation "
                f"{value.incarnation} is not in the store"
            )
    return ""


def _unknown_lease(
    tx: Transaction,
    context: OperationContext,
    certificate: rounds_pb2.Certificate,
    value: rounds_pb2.RoundValue,
) -> str:
    """Sentence about a lease with the own signature and a number that the store never gave."""
    contributions, _ = parsed_contributions(certificate.contributions)
    signed = [
        leased.lease
        for contribution in (() if contributions is None else contributions.contributions)
        for leased in contribution.ranges
    ]
    for lease in _newest_first(signed)[:MAX_CHECKED_LEASES]:
        named = common_pb2.Lease.FromString(lease.payload)
        newest = tx.newest_lease_number(value.run_id, named.incarnation, named.peer_id)
        if named.run_id != value.run_id or named.lease_number <= newest:
            continue
        key = context.signing_key.public_key
        if has_valid_signature(key, Tag.LEASE, lease.payload, lease.signature):
            return (
                f"its own lease {named.lease_number} for {named.peer_id[:12]} in outer step "
                f"{value.outer_step} of incarnation {value.incarnation} is not in the store, which "
                f"ends at lease {newest}"
            )
    return ""


def _newest_first(signed: Iterable[common_pb2.Signed]) -> list[common_pb2.Signed]:
    return sorted(
        signed,
        key=lambda lease: common_pb2.Lease.FromString(lease.payload).lease_number,
        reverse=True,
    )


def settle_from(beyond: SignedBeyond, holdings: Iterable[Holding]) -> list[Holding]:
    """Holdings with the patience for missing certificates counted from the discovery on: members
    that train on attest ever newer states, and would be waited for without end.
    """
    return [
        replace(
            holding,
            since_unix_seconds=min(holding.since_unix_seconds, beyond.detect_unix_seconds),
        )
        for holding in holdings
    ]


def reason_to_wait(
    beyond: SignedBeyond,
    holdings: Iterable[Holding],
    *,
    incarnation: int,
    base_outer_step: int,
    certified_outer_step: int,
    is_needed: bool,
) -> str:
    """Why a new incarnation from `base_outer_step` is the operator's decision; "" if nothing that a
    live member holds would be lost by it.

    `is_needed` is true when the epoch cannot go on anyway, which is so after the operator has had
    the peers' states removed.
    """
    held = max((holding.outer_step for holding in holdings if holding.peer_id), default=0)
    is_lost = held > certified_outer_step
    if not is_needed:
        newest = (beyond.incarnation, beyond.outer_step)
        is_lost = is_lost or newest > (incarnation, certified_outer_step)
        is_lost = is_lost or base_outer_step < certified_outer_step
    if not is_lost:
        return ""
    return stall_reason(
        beyond,
        certified_outer_step=certified_outer_step,
        newest_outer_step=max(held, beyond.outer_step),
    )
