"""What the coordinator checks before it gives its half to a value.

The rules are the members' own (peer/swarm/contribution_check.py), as far as the coordinator can
know them. A certificate that members alone proved needs none of this: it is proof, and crediting
decides range by range what counts.
"""

from collections import defaultdict

from google.protobuf.message import DecodeError

from coordinator.operations.common import OperationContext, load_book
from coordinator.operations.states import proved_digest
from coordinator.store.base import Transaction
from protos.contract.certificate import Tag
from protos.contract.signing import has_valid_signature
from protos.muster.v1 import common_pb2, rounds_pb2


def parsed_contributions(data: bytes) -> tuple[rounds_pb2.Contributions | None, str]:
    """The contributions with every lease readable, else why not."""
    try:
        contributions: rounds_pb2.Contributions = rounds_pb2.Contributions.FromString(data)
        for contribution in contributions.contributions:
            for leased in contribution.ranges:
                common_pb2.Lease.FromString(leased.lease.payload)
    except DecodeError as error:
        return None, f"contributions cannot be read: {error}"
    return contributions, ""


def reason_against_half(
    tx: Transaction,
    context: OperationContext,
    value: rounds_pb2.RoundValue,
    contributions: rounds_pb2.Contributions,
    directive: common_pb2.Directive,
) -> str:
    """Why the coordinator's half is not given to this value under this roster; "" if it may be."""
    limit_by_peer = {entry.peer_id: entry.max_round_tokens for entry in directive.roster}
    seq_len = load_book(tx, value.run_id).seq_len
    tokens_by_peer: dict[str, int] = defaultdict(int)
    for contribution in contributions.contributions:
        peer_id = contribution.peer_id
        if peer_id not in limit_by_peer:
            return f"{peer_id} is not in roster {directive.directive_number}"
        if peer_id in tokens_by_peer:
            return f"{peer_id} is listed twice"
        cursor = (0, 0)
        for leased in contribution.ranges:
            reason = _reason_against_range(context, value, peer_id, leased)
            if reason:
                return f"range of {peer_id}: {reason}"
            number = common_pb2.Lease.FromString(leased.lease.payload).lease_number
            if (number, leased.begin_window) < cursor:
                return (
                    f"range of {peer_id}: lease {number} from window {leased.begin_window} repeats"
                )
            cursor = (number, leased.end_window)
            tokens_by_peer[peer_id] += (leased.end_window - leased.begin_window) * seq_len
        if tokens_by_peer[peer_id] > limit_by_peer[peer_id]:
            return (
                f"{peer_id} brings {tokens_by_peer[peer_id]} tokens;"
                f" at most {limit_by_peer[peer_id]} are allowed"
            )
    if not sum(tokens_by_peer.values()):
        return "contributions hold no tokens"
    return _reason_against_previous_state(tx, context, value)


def _reason_against_range(
    context: OperationContext,
    value: rounds_pb2.RoundValue,
    peer_id: str,
    leased: rounds_pb2.LeasedRange,
) -> str:
    signed = leased.lease
    key = context.signing_key.public_key
    if not has_valid_signature(key, Tag.LEASE, signed.payload, signed.signature):
        return "its lease is not signed by this coordinator"
    lease = common_pb2.Lease.FromString(signed.payload)
    found = (lease.run_id, lease.incarnation, lease.peer_id)
    if found != (value.run_id, value.incarnation, peer_id):
        return f"lease {lease.lease_number} is for {found}, not for this peer and incarnation"
    allowed = (lease.range.begin_window, lease.range.end_window)
    if not allowed[0] <= leased.begin_window < leased.end_window <= allowed[1]:
        return (
            f"windows {leased.begin_window} to {leased.end_window} are not inside lease"
            f" {lease.lease_number}, which holds {allowed[0]} to {allowed[1]}"
        )
    return ""


def _reason_against_previous_state(
    tx: Transaction, context: OperationContext, value: rounds_pb2.RoundValue
) -> str:
    """A quorum's attestations or the chain may name another state than the value does.

    The record of the value's own incarnation is no help: a digest covers the incarnation's number,
    so the base's digest is never that of the same state inside the new incarnation.
    """
    outer_step = value.outer_step - 1
    proved = proved_digest(
        tx, context, value.run_id, incarnation=value.incarnation, outer_step=outer_step
    )
    if proved is None or proved == value.previous_state_digest:
        return ""
    return (
        f"it continues state {value.previous_state_digest.hex()[:12]} of outer step {outer_step};"
        f" {proved.hex()[:12]} is proved"
    )
