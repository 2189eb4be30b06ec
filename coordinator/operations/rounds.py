"""Rounds: the coordinator as a voter of one half, and as the keeper of certificates.

A certificate is proof whoever brings it. Certificates are taken in order of outer_step, because
each names the roster that decides the next; one that comes too early is answered with what is
missing.
"""

from collections.abc import Sequence

from google.protobuf.message import DecodeError

from coordinator.domain import acceptor
from coordinator.domain.ledger import ChainHead, decide_chain
from coordinator.operations.common import (
    OperationContext,
    load_book,
    load_directive,
    load_run,
    unix_ms,
)
from coordinator.operations.crediting import take_certificate
from coordinator.operations.requests_ledger import (
    CertificateReceipt,
    ExchangeRequest,
    ExchangeResponse,
    FetchCertificatesRequest,
    FetchCertificatesResponse,
    ReportCertificatesRequest,
    ReportCertificatesResponse,
    SubmitVotesRequest,
    SubmitVotesResponse,
)
from coordinator.operations.round_check import parsed_contributions, reason_against_half
from coordinator.operations.states import voters_of_directive
from coordinator.operations.store_age import load_beyond, note_signed_beyond
from coordinator.store.base import Transaction
from coordinator.store.rows import AcceptorRow, CertificateRow, RunRow
from protos.contract.certificate import (
    certificate_from_votes,
    contributions_digest,
    half_votes_by_voter,
    public_key_by_voter,
)
from protos.contract.ids import COORDINATOR_VOTER
from protos.contract.signing import check_certificate, is_valid_vote
from protos.muster.v1 import common_pb2, rounds_pb2


def exchange(
    tx: Transaction,
    request: ExchangeRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> ExchangeResponse:
    """Promise not to vote below the attempt and say what was voted, or return the certificate that
    exists already.
    """
    run = load_run(tx, request.run_id)
    answer = rounds_pb2.ExchangeAnswer(newest_directive=_signed_directive(tx, run))
    if request.incarnation != run.incarnation:
        reason = f"incarnation {run.incarnation} is in force, not {request.incarnation}"
        return ExchangeResponse(answer=answer, certificate=None, is_promised=False, reason=reason)
    stored = tx.certificate(run.run_id, request.incarnation, request.outer_step)
    if stored is not None:
        certificate = rounds_pb2.Certificate.FromString(stored.certificate)
        _add_own_vote(answer, certificate)
        reason = f"outer step {request.outer_step} is certified"
        return ExchangeResponse(
            answer=answer, certificate=certificate, is_promised=False, reason=reason
        )
    certified = load_book(tx, run.run_id).certified_outer_step
    if request.outer_step != certified + 1 or run.incarnation == 0:
        reason = (
            f"outer step {certified + 1} of incarnation {run.incarnation} is next; report what is "
            "missing"
        )
        return ExchangeResponse(answer=answer, certificate=None, is_promised=False, reason=reason)
    number = chain_head(tx, run).directive_number
    if request.peer_id not in voters_of_directive(tx, context, run.run_id, number):
        reason = f"{request.peer_id} has no vote in roster {number}; only its voters may ask"
        return ExchangeResponse(answer=answer, certificate=None, is_promised=False, reason=reason)
    beyond = load_beyond(tx, run)
    if beyond is not None:
        reason = f"no promise is given: {beyond.reason}"
        return ExchangeResponse(answer=answer, certificate=None, is_promised=False, reason=reason)
    decision = acceptor.promise(
        _acceptor_state(tx, run.run_id, request.incarnation, request.outer_step),
        attempt=request.attempt,
    )
    if decision.is_promised:
        _put_acceptor(tx, run.run_id, request.incarnation, request.outer_step, decision.state)
    return ExchangeResponse(
        answer=answer, certificate=None, is_promised=decision.is_promised, reason=decision.reason
    )


def _add_own_vote(answer: rounds_pb2.ExchangeAnswer, certificate: rounds_pb2.Certificate) -> None:
    for vote in certificate.votes:
        if vote.voter == COORDINATOR_VOTER:
            answer.highest_vote.CopyFrom(
                rounds_pb2.Vote(
                    value=certificate.value,
                    attempt=certificate.attempt,
                    voter=vote.voter,
                    signature=vote.signature,
                )
            )
            answer.contributions = certificate.contributions


def _signed_directive(tx: Transaction, run: RunRow) -> common_pb2.Signed | None:
    row = tx.directive(run.run_id, run.directive_number)
    return None if row is None else common_pb2.Signed(payload=row.payload, signature=row.signature)


def _acceptor_state(
    tx: Transaction, run_id: str, incarnation: int, outer_step: int
) -> acceptor.AcceptorState:
    row = tx.acceptor(run_id, incarnation, outer_step)
    if row is None:
        return acceptor.AcceptorState()
    return acceptor.AcceptorState(
        promised_attempt=row.promised_attempt,
        vote_attempt=row.vote_attempt,
        vote_value=row.vote_value,
    )


def _put_acceptor(
    tx: Transaction,
    run_id: str,
    incarnation: int,
    outer_step: int,
    state: acceptor.AcceptorState,
    *,
    equivocation_reason: str = "",
) -> None:
    tx.put_acceptor(
        AcceptorRow(
            run_id,
            incarnation,
            outer_step,
            state.promised_attempt,
            state.vote_attempt,
            state.vote_value,
            equivocation_reason,
        )
    )


def submit_votes(
    tx: Transaction,
    request: SubmitVotesRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> SubmitVotesResponse:
    """Add the coordinator's half if that completes a quorum; store, credit and return the
    certificate.
    """
    if not request.votes:
        return SubmitVotesResponse(certificate=None, reason="no votes were offered")
    first = request.votes[0]
    if any(vote.value != first.value or vote.attempt != first.attempt for vote in request.votes):
        return SubmitVotesResponse(certificate=None, reason="votes differ in value or attempt")
    value = _round_value(first.value)
    if value is None or value.run_id != request.run_id:
        return SubmitVotesResponse(certificate=None, reason="the value is not one of this run")
    run = load_run(tx, request.run_id)
    stored = tx.certificate(run.run_id, value.incarnation, value.outer_step)
    if stored is not None and stored.rolled_back_by == 0:
        certificate = rounds_pb2.Certificate.FromString(stored.certificate)
        return SubmitVotesResponse(certificate=certificate, reason="")
    offered = rounds_pb2.Certificate(value=first.value, contributions=request.contributions)
    beyond = note_signed_beyond(tx, context, run, offered, value, now_unix_seconds=now_unix_seconds)
    directive, reason = _roster_of(tx, context, run, value)
    if directive is None:
        return SubmitVotesResponse(certificate=None, reason=reason)
    if contributions_digest(request.contributions) != value.contributions_digest:
        reason = "contributions do not match the digest in the value"
        return SubmitVotesResponse(certificate=None, reason=reason)
    contributions, reason = parsed_contributions(request.contributions)
    if contributions is None:
        return SubmitVotesResponse(certificate=None, reason=reason)
    votes, reason = _valid_votes(request.votes, directive)
    state = _acceptor_state(tx, run.run_id, value.incarnation, value.outer_step)
    decision = acceptor.decide_vote(
        state,
        attempt=first.attempt,
        value=first.value,
        voters=set(votes),
        half_votes=half_votes_by_voter(directive.roster),
    )
    if not decision.is_certificate:
        return SubmitVotesResponse(
            certificate=None, reason="; ".join(part for part in (decision.reason, reason) if part)
        )
    ballots = list(votes.values())
    if decision.signs:
        reason = (
            reason_against_half(tx, context, value, contributions, directive)
            if beyond is None
            else f"no half vote is given: {beyond.reason}"
        )
        if reason:
            return SubmitVotesResponse(certificate=None, reason=reason)
        ballots.append(context.signing_key.vote(first.value, first.attempt, COORDINATOR_VOTER))
    certificate = certificate_from_votes(ballots, request.contributions)
    receipt = _take(tx, certificate, value, now_unix_seconds=now_unix_seconds)
    if not receipt.is_stored:
        return SubmitVotesResponse(certificate=None, reason=receipt.reason)
    if decision.signs:  # with the certificate or not at all
        _put_acceptor(tx, run.run_id, value.incarnation, value.outer_step, decision.state)
    return SubmitVotesResponse(certificate=certificate, reason="")


def _round_value(data: bytes) -> rounds_pb2.RoundValue | None:
    try:
        value: rounds_pb2.RoundValue = rounds_pb2.RoundValue.FromString(data)
    except DecodeError:
        return None
    return value


def _valid_votes(
    votes: tuple[rounds_pb2.Vote, ...], directive: common_pb2.Directive
) -> tuple[dict[str, rounds_pb2.Vote], str]:
    """Valid votes of members by voter, and which were left out."""
    keys = public_key_by_voter(directive.roster, b"")
    valid: dict[str, rounds_pb2.Vote] = {}
    left_out = []
    for vote in votes:
        key = keys.get(vote.voter, b"")
        if vote.voter != COORDINATOR_VOTER and key and is_valid_vote(vote, key):
            valid[vote.voter] = vote
        else:
            left_out.append(vote.voter)
    return valid, f"not counted: {', '.join(left_out)}" if left_out else ""


def chain_head(tx: Transaction, run: RunRow) -> ChainHead:
    """Newest outer step in force, and the directive whose roster decides the next."""
    outer_step = load_book(tx, run.run_id).certified_outer_step
    newest = tx.certificate(run.run_id, run.incarnation, outer_step)
    if newest is not None:
        number = newest.next_directive_number
    else:
        record = tx.incarnation(run.run_id, run.incarnation)
        number = 0 if record is None else _first_directive_number(record.payload)
    return ChainHead(incarnation=run.incarnation, outer_step=outer_step, directive_number=number)


def _first_directive_number(record_payload: bytes) -> int:
    record = common_pb2.IncarnationRecord.FromString(record_payload)
    number: int = common_pb2.Directive.FromString(record.directive.payload).directive_number
    return number


def _roster_of(
    tx: Transaction, context: OperationContext, run: RunRow, value: rounds_pb2.RoundValue
) -> tuple[common_pb2.Directive | None, str]:
    """Directive that decides this value, if the value continues the chain; else why not."""
    if run.incarnation == 0:
        return None, "incarnation 0 has no rounds"
    verdict = decide_chain(
        chain_head(tx, run),
        incarnation=value.incarnation,
        outer_step=value.outer_step,
        roster_number=value.roster_directive_number,
    )
    if not verdict.is_next:
        return None, verdict.reason
    following = tx.directive(run.run_id, value.next_directive_number)
    if following is None or following.incarnation != value.incarnation:
        return (
            None,
            f"directive {value.next_directive_number} was not issued for incarnation "
            f"{value.incarnation}",
        )
    if value.next_directive_number < value.roster_directive_number:
        return (
            None,
            f"directive {value.next_directive_number} is older than "
            f"{value.roster_directive_number}",
        )
    directive = load_directive(tx, context, run.run_id, value.roster_directive_number)
    return (
        directive,
        "" if directive else f"directive {value.roster_directive_number} is not in the store",
    )


def report_certificates(
    tx: Transaction,
    request: ReportCertificatesRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> ReportCertificatesResponse:
    """Check each certificate against its roster and the chain, store and credit it; known ones are
    confirmed. The swarm hears of a new directive here first: it takes effect with a step.
    """
    run = load_run(tx, request.run_id)
    receipts = tuple(
        _report(tx, certificate, run, context=context, now_unix_seconds=now_unix_seconds)
        for certificate in request.certificates
    )
    return ReportCertificatesResponse(
        receipts=receipts, directive=_later_directive(tx, run, request.certificates)
    )


def _later_directive(
    tx: Transaction, run: RunRow, certificates: Sequence[rounds_pb2.Certificate]
) -> common_pb2.Signed | None:
    """The newest directive, if the newest of the certificates is of this incarnation and names an
    older one.
    """
    value = _round_value(certificates[-1].value) if certificates else None
    if value is None or (value.run_id, value.incarnation) != (run.run_id, run.incarnation):
        return None
    if value.next_directive_number >= run.directive_number:
        return None
    return _signed_directive(tx, run)


def _report(
    tx: Transaction,
    certificate: rounds_pb2.Certificate,
    run: RunRow,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> CertificateReceipt:
    value = _round_value(certificate.value)
    if value is None or value.run_id != run.run_id:
        return _refusal(0, "the value is not one of this run")
    stored = tx.certificate(run.run_id, value.incarnation, value.outer_step)
    if stored is not None:
        return _confirm(
            tx, certificate, stored, run, context=context, now_unix_seconds=now_unix_seconds
        )
    beyond = note_signed_beyond(
        tx, context, run, certificate, value, now_unix_seconds=now_unix_seconds
    )
    directive, reason = _roster_of(tx, context, run, value)
    if directive is None:
        why = f"; {beyond.reason}" if beyond is not None else ""
        return _refusal(value.outer_step, reason + why)
    reason = check_certificate(
        certificate, directive=directive, coordinator_public_key=context.signing_key.public_key
    )
    if reason:
        return _refusal(value.outer_step, reason)
    receipt = _take(tx, certificate, value, now_unix_seconds=now_unix_seconds)
    if receipt.is_stored and any(vote.voter == COORDINATOR_VOTER for vote in certificate.votes):
        _remember_own_vote(tx, certificate, value)
    return receipt


def _remember_own_vote(
    tx: Transaction, certificate: rounds_pb2.Certificate, value: rounds_pb2.RoundValue
) -> None:
    """A half vote that the store had lost is the coordinator's own again (store_age.py)."""
    state = _acceptor_state(tx, value.run_id, value.incarnation, value.outer_step)
    attempt = certificate.attempt
    voted = acceptor.AcceptorState(
        promised_attempt=max(state.promised_attempt, attempt),
        vote_attempt=attempt,
        vote_value=certificate.value,
    )
    _put_acceptor(tx, value.run_id, value.incarnation, value.outer_step, voted)


def _take(
    tx: Transaction,
    certificate: rounds_pb2.Certificate,
    value: rounds_pb2.RoundValue,
    *,
    now_unix_seconds: float,
) -> CertificateReceipt:
    try:
        receipt = take_certificate(tx, certificate, value, now_unix_seconds=now_unix_seconds)
    except DecodeError as error:
        return _refusal(value.outer_step, f"contributions cannot be read: {error}")
    if receipt.uncredited_tokens:
        tx.insert_event(
            run_id=value.run_id,
            unix_ms=unix_ms(now_unix_seconds),
            kind="uncredited",
            peer_id="",
            text=(
                f"outer step {value.outer_step}: {receipt.uncredited_tokens} tokens; "
                f"{receipt.reason}"
            ),
        )
    return receipt


def _confirm(
    tx: Transaction,
    certificate: rounds_pb2.Certificate,
    stored: CertificateRow,
    run: RunRow,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> CertificateReceipt:
    """Answer to a certificate of an outer step that has one; another proven value is shown as
    equivocation.
    """
    reason = f"rolled back by incarnation {stored.rolled_back_by}" if stored.rolled_back_by else ""
    if certificate.value != stored.value:
        value = rounds_pb2.RoundValue.FromString(certificate.value)
        directive = load_directive(tx, context, run.run_id, value.roster_directive_number)
        key = context.signing_key.public_key
        flaw = "its roster is not known"
        if directive is not None:
            flaw = check_certificate(certificate, directive=directive, coordinator_public_key=key)
        if flaw:
            return _refusal(stored.outer_step, flaw)
        reason = acceptor.equivocation(
            stored_value=stored.value, other_value=certificate.value, outer_step=stored.outer_step
        )
        _show_equivocation(tx, stored, reason, now_unix_seconds=now_unix_seconds)
        return _refusal(stored.outer_step, reason)
    return CertificateReceipt(
        outer_step=stored.outer_step,
        is_stored=True,
        credited_tokens=0 if stored.rolled_back_by else stored.credited_tokens,
        uncredited_tokens=stored.uncredited_tokens,
        reason=reason,
    )


def _show_equivocation(
    tx: Transaction, stored: CertificateRow, reason: str, *, now_unix_seconds: float
) -> None:
    row = tx.acceptor(stored.run_id, stored.incarnation, stored.outer_step)
    if row is not None and row.equivocation_reason:
        return
    state = _acceptor_state(tx, stored.run_id, stored.incarnation, stored.outer_step)
    _put_acceptor(
        tx, stored.run_id, stored.incarnation, stored.outer_step, state, equivocation_reason=reason
    )
    tx.insert_event(
        run_id=stored.run_id,
        unix_ms=unix_ms(now_unix_seconds),
        kind="equivocation",
        peer_id="",
        text=reason,
    )


def _refusal(outer_step: int, reason: str) -> CertificateReceipt:
    return CertificateReceipt(
        outer_step=outer_step,
        is_stored=False,
        credited_tokens=0,
        uncredited_tokens=0,
        reason=reason,
    )


def fetch_certificates(
    tx: Transaction,
    request: FetchCertificatesRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> FetchCertificatesResponse:
    """Certificates in force of one incarnation from an outer step on, as many as fit."""
    found: list[bytes] = []
    total_bytes = 0
    for row in tx.live_certificates(
        request.run_id,
        from_outer_step=request.from_outer_step,
        num_certificates=request.num_certificates,
    ):
        total_bytes += len(row.certificate)
        if row.incarnation != request.incarnation or (found and total_bytes > request.max_bytes):
            break
        found.append(row.certificate)
    return FetchCertificatesResponse(certificates=tuple(found))
