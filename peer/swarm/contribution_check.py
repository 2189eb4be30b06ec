"""Is a contribution backed by leases? The same answer on every member, from replicated state and
signatures alone.

A contribution's weight is the tokens of its ranges, so nothing is taken from a sender's word: every
range lies inside a lease that the coordinator signed for this peer in this incarnation, ranges rise
strictly in (lease number, window), the first lies above the peer's cursor in the replicated state,
and the sum stays within the roster's limit.
"""

import hashlib
from dataclasses import dataclass

from peer.shared_vectors import StatePosition
from peer.swarm.round_types import ContributionVerdict
from protos.contract.certificate import Tag
from protos.contract.digest import StateMeta
from protos.contract.ids import COORDINATOR_VOTER
from protos.contract.signing import (
    SigningKey,
    check_certificate,
    has_valid_signature,
    is_valid_vote,
)
from protos.muster.v1 import common_pb2, rounds_pb2

_MAX_RANGES = 4096
_MAX_CACHED = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRules:
    """What contributions of one outer step are held against."""

    run_id: str
    incarnation: int
    directive: common_pb2.Directive
    cursor_by_peer: dict[str, tuple[int, int]]
    """peer_id -> (lease number, end window) of its last committed range."""
    seq_len: int
    coordinator_public_key: bytes


def check_contribution(
    contribution: rounds_pb2.Contribution, rules: LeaseRules
) -> ContributionVerdict:
    """Count a contribution's tokens, or say which rule it breaks."""
    peer_id = contribution.peer_id
    entry = next((e for e in rules.directive.roster if e.peer_id == peer_id), None)
    if entry is None:
        return _refused(f"{peer_id} is not in roster {rules.directive.directive_number}")
    if len(contribution.ranges) > _MAX_RANGES:
        return _refused(f"{len(contribution.ranges)} ranges; at most {_MAX_RANGES} are allowed")
    cursor, num_windows = rules.cursor_by_peer.get(peer_id, (0, 0)), 0
    for leased in contribution.ranges:
        problem = _problem_with(leased, peer_id=peer_id, cursor=cursor, rules=rules)
        if problem:
            return _refused(problem)
        lease = common_pb2.Lease.FromString(leased.lease.payload)
        cursor = (lease.lease_number, leased.end_window)
        num_windows += leased.end_window - leased.begin_window
    num_tokens = num_windows * rules.seq_len
    if num_tokens > entry.max_round_tokens:
        return _refused(f"{num_tokens} tokens; at most {entry.max_round_tokens} are allowed")
    return ContributionVerdict(num_tokens=num_tokens, reason="")


def _problem_with(
    leased: rounds_pb2.LeasedRange, *, peer_id: str, cursor: tuple[int, int], rules: LeaseRules
) -> str:
    signed = leased.lease
    if not has_valid_signature(
        rules.coordinator_public_key, Tag.LEASE, signed.payload, signed.signature
    ):
        return "a lease is not signed by the coordinator"
    lease = common_pb2.Lease.FromString(signed.payload)
    found = (lease.run_id, lease.incarnation, lease.peer_id)
    if found != (rules.run_id, rules.incarnation, peer_id):
        return f"lease {lease.lease_number} is for {found}, not for this peer and incarnation"
    inside = lease.range.begin_window <= leased.begin_window < leased.end_window
    if not inside or leased.end_window > lease.range.end_window:
        return (
            f"windows {leased.begin_window}-{leased.end_window} are not inside lease "
            f"{lease.lease_number} ({lease.range.begin_window}-{lease.range.end_window})"
        )
    number, end_window = cursor
    is_above = lease.lease_number > number or (
        lease.lease_number == number and leased.begin_window >= end_window
    )
    if not is_above:
        return (
            f"lease {lease.lease_number} from window {leased.begin_window} is not above the "
            f"cursor {number}:{end_window}"
        )
    return ""


def _refused(reason: str) -> ContributionVerdict:
    return ContributionVerdict(num_tokens=0, reason=reason)


def cursors_after(
    contributions: rounds_pb2.Contributions, cursors: dict[str, tuple[int, int]]
) -> dict[str, tuple[int, int]]:
    """Cursors once these contributions are committed."""
    after = dict(cursors)
    for contribution in contributions.contributions:
        if contribution.ranges:
            last = contribution.ranges[-1]
            lease = common_pb2.Lease.FromString(last.lease.payload)
            after[contribution.peer_id] = (lease.lease_number, last.end_window)
    return after


def total_tokens(contributions: rounds_pb2.Contributions, *, seq_len: int) -> int:
    """Tokens of checked contributions."""
    num_windows: int = sum(
        r.end_window - r.begin_window for c in contributions.contributions for r in c.ranges
    )
    return num_windows * seq_len


class SignedChecks:
    """RoundChecks with real keys, for one outer step; verdicts are remembered, messages repeat a
    lot.
    """

    def __init__(self, *, key: SigningKey, rules: LeaseRules) -> None:
        self._key, self._rules = key, rules
        self._verdict_by_hash: dict[bytes, ContributionVerdict] = {}
        self._directive_by_hash: dict[bytes, common_pb2.Directive | None] = {}
        """By SHA-256 of what was checked, which may be as large as a message and of no use."""
        self._key_by_voter = {
            entry.peer_id: entry.public_key for entry in rules.directive.roster if entry.has_vote
        }

    def sign_vote(self, value: bytes, attempt: int) -> rounds_pb2.Vote:
        """Own signed vote."""
        return self._key.vote(value, attempt, self._key.peer_id)

    def is_valid_vote(self, vote: rounds_pb2.Vote) -> bool:
        """True for a member's or the coordinator's vote under the directive in force."""
        key = self._key_by_voter.get(vote.voter)
        if vote.voter == COORDINATOR_VOTER:
            key = self._rules.coordinator_public_key
        return key is not None and is_valid_vote(vote, key)

    def check_certificate(self, certificate: rounds_pb2.Certificate) -> str:
        """Empty if it is proof under the directive in force."""
        return check_certificate(
            certificate,
            directive=self._rules.directive,
            coordinator_public_key=self._rules.coordinator_public_key,
        )

    def check_contribution(self, contribution: rounds_pb2.Contribution) -> ContributionVerdict:
        """See the function of the same name."""
        key = hashlib.sha256(contribution.SerializeToString()).digest()
        if key not in self._verdict_by_hash:
            if len(self._verdict_by_hash) >= _MAX_CACHED:
                self._verdict_by_hash.clear()
            self._verdict_by_hash[key] = check_contribution(contribution, self._rules)
        return self._verdict_by_hash[key]

    def check_directive(self, signed: common_pb2.Signed) -> common_pb2.Directive | None:
        """Content of a directive of this run and incarnation."""
        key = hashlib.sha256(signed.SerializeToString()).digest()
        if key not in self._directive_by_hash:
            if len(self._directive_by_hash) >= _MAX_CACHED:
                self._directive_by_hash.clear()
            self._directive_by_hash[key] = open_directive(
                signed,
                run_id=self._rules.run_id,
                incarnation=self._rules.incarnation,
                coordinator_public_key=self._rules.coordinator_public_key,
            )
        return self._directive_by_hash[key]


def open_directive(
    signed: common_pb2.Signed, *, run_id: str, incarnation: int, coordinator_public_key: bytes
) -> common_pb2.Directive | None:
    """Content of a signed directive, or None if it is not the coordinator's for this run and
    incarnation.
    """
    if not has_valid_signature(
        coordinator_public_key, Tag.DIRECTIVE, signed.payload, signed.signature
    ):
        return None
    directive = common_pb2.Directive.FromString(signed.payload)
    is_ours = (directive.run_id, directive.incarnation) == (run_id, incarnation)
    return directive if is_ours else None


def next_meta(meta: StateMeta, certificate: rounds_pb2.Certificate, *, seq_len: int) -> StateMeta:
    """Replicated bookkeeping after a certificate; the vectors follow by the exact update."""
    value = rounds_pb2.RoundValue.FromString(certificate.value)
    contributions = rounds_pb2.Contributions.FromString(certificate.contributions)
    return StateMeta(
        run_digest=meta.run_digest,
        incarnation=meta.incarnation,
        outer_step=value.outer_step,
        schedule_tokens=meta.schedule_tokens + total_tokens(contributions, seq_len=seq_len),
        directive_number=value.next_directive_number,
        lease_cursor_by_peer=cursors_after(contributions, meta.lease_cursor_by_peer),
    )


def position_of(meta: StateMeta, signed: common_pb2.Signed) -> StatePosition:
    """What the trainer is told of a state in shared memory, its digest apart."""
    directive = common_pb2.Directive.FromString(signed.payload)
    return StatePosition(
        incarnation=meta.incarnation,
        outer_step=meta.outer_step,
        schedule_tokens=meta.schedule_tokens,
        directive_number=meta.directive_number,
        planned_round_tokens=sum(entry.round_tokens for entry in directive.roster),
        cooldown_start_tokens=directive.cooldown_start_tokens,
        budget_tokens=directive.budget_tokens,
    )
