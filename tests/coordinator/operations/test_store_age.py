"""A store restored from a backup that is older than what its coordinator signed: found by its own
signatures, said with the remedy, never a vote against a forgotten promise, and a way out.

Worlds are deterministic, so the backup is a second world that lived through the beginning only.
"""

from coordinator.domain.policy import SwarmPolicy
from coordinator.operations import ledger_verify, membership, rounds
from coordinator.operations.requests import PeerExitedRequest
from coordinator.operations.requests_ledger import (
    ExchangeRequest,
    ExchangeResponse,
    ReportCertificatesRequest,
    SubmitVotesRequest,
    SubmitVotesResponse,
    VerifyLedgerRequest,
)
from protos.contract.certificate import contributions_digest
from protos.contract.ids import COORDINATOR_VOTER
from protos.contract.telemetry import RunState
from protos.muster.v1 import common_pb2, rounds_pb2
from tests.coordinator.operations.swarm_world import RUN_ID, SwarmWorld, digest_of

POLICY = SwarmPolicy(checkpoint_interval_seconds=1e6)


def history(num_steps: int) -> SwarmWorld:
    """Two voters and some outer steps made by both."""
    world = SwarmWorld.create(policy=POLICY, min_peers=2)
    world.start(2)
    for _ in range(num_steps):
        world.commit(num_windows=2)
    return world


def certificate_at(world: SwarmWorld, outer_step: int) -> rounds_pb2.Certificate:
    with world.store.read() as tx:
        row = tx.certificate(RUN_ID, 1, outer_step)
    return rounds_pb2.Certificate.FromString(row.certificate)


def offer(world: SwarmWorld, outer_step: int, *, round_of: int = 0) -> SubmitVotesResponse:
    """Peer 0 alone asks for the coordinator's half; `round_of` tells different values apart."""
    peer = world.peer(0)
    contributions = rounds_pb2.Contributions()
    part = contributions.contributions.add(peer_id=peer.peer_id, loss_nats=2.0 + round_of)
    (lease,) = world.acquire(0, 2)
    named = common_pb2.Lease.FromString(lease.payload).range
    part.ranges.add(lease=lease, begin_window=named.begin_window, end_window=named.end_window)
    body = contributions.SerializeToString()
    number = world.directive().directive_number
    value = rounds_pb2.RoundValue(
        run_id=RUN_ID,
        incarnation=1,
        outer_step=outer_step,
        roster_directive_number=number,
        averaged_digest=bytes(32),
        contributions_digest=contributions_digest(body),
        previous_state_digest=digest_of(1, outer_step - 1),
        next_directive_number=number,
    ).SerializeToString()
    vote = peer.key.vote(value, 0, peer.peer_id)
    request = SubmitVotesRequest(run_id=RUN_ID, votes=(vote,), contributions=body)
    response: SubmitVotesResponse = world.do(rounds.submit_votes, request)
    return response


def exchange(world: SwarmWorld, outer_step: int) -> ExchangeResponse:
    request = ExchangeRequest(
        run_id=RUN_ID,
        peer_id=world.id_of(0),
        incarnation=1,
        outer_step=outer_step,
        attempt=1,
    )
    response: ExchangeResponse = world.do(rounds.exchange, request)
    return response


def report(world: SwarmWorld, *certificates: rounds_pb2.Certificate) -> list[str]:
    """Reasons of the receipts."""
    request = ReportCertificatesRequest(run_id=RUN_ID, certificates=certificates)
    return [receipt.reason for receipt in world.do(rounds.report_certificates, request).receipts]


def hold(world: SwarmWorld, outer_step: int) -> None:
    """Both peers say that they hold this state, until the patience for more is over."""
    for peer in world.peers:
        peer.outer_step = outer_step
    for _ in range(4):
        world.attest()
        world.tick(5.0)


def events(world: SwarmWorld) -> str:
    with world.store.read() as tx:
        return "\n".join(row.text for row in tx.events(RUN_ID, num_events=100))


def test_an_unknown_own_half_vote_ends_the_coordinators_voting() -> None:
    """The newest certificate bears a half vote from after the backup: it is taken as the proof that
    it is, and nothing is signed in that incarnation any more; a new one begins and loses nothing.
    """
    lived, restored = history(1), history(1)
    certificate = offer(lived, 2).certificate
    assert certificate is not None
    assert COORDINATOR_VOTER in {vote.voter for vote in certificate.votes}
    assert exchange(restored, 2).is_promised, "nothing is known yet"

    (reason,) = report(restored, certificate)
    assert "not credited: lease 2 is not in the book" in reason
    assert certificate_at(restored, 2) == certificate
    assert "its own half vote for outer step 2 of incarnation 1 is not in the store" in events(
        restored
    )
    answer = exchange(restored, 3)
    assert not answer.is_promised and "older than what this coordinator has signed" in answer.reason
    refused = offer(restored, 3)
    assert refused.certificate is None and "no half vote is given" in refused.reason

    hold(restored, 2)
    status = restored.status()
    assert (status.incarnation, status.state) == (2, RunState.RUNNING)
    assert status.outer_step == 2 and status.rolled_back_tokens == 0
    restored.notice()
    hold(restored, 2)
    restored.commit(num_windows=2)
    found = restored.do(ledger_verify.verify_ledger, VerifyLedgerRequest(run_id=RUN_ID))
    assert found.violations == ()


def test_without_the_lost_record_it_would_sign_twice() -> None:
    """What the abstention is for: the restored coordinator would complete another value."""
    lived, restored = history(1), history(1)
    first = offer(lived, 2).certificate
    second = offer(restored, 2, round_of=1).certificate
    assert first is not None and second is not None and first.value != second.value
    assert "two certificates with different values" in report(restored, first)[0]


def test_steps_that_cannot_be_proved_stall_the_run_with_the_remedy() -> None:
    """Certificates between the backup and the newest are gone: going on would undo steps, which is
    the operator's decision. It is said at once, and the remedy of the runbook works.
    """
    lived, restored = history(4), history(1)
    reason = report(restored, certificate_at(lived, 4))[0]
    assert "outer step 2 is missing" in reason and "its own lease" in reason
    hold(restored, 4)
    status = restored.status()
    assert status.state == RunState.STALLED and status.incarnation == 1
    for part in ("older than what this coordinator has signed", "HOME/state", "runbook"):
        assert part in status.state_reason
    assert "STALLED: the store is older" in events(restored)

    for index in (0, 1):  # the remedy: stopped, states removed, started again
        gone = PeerExitedRequest(peer_id=restored.id_of(index), reason="stopped")
        restored.do(membership.peer_exited, gone)
        restored.now += 1.0
        restored.join(index)
        restored.attest(index)
    for _ in range(5):
        restored.notice()
        restored.tick(5.0)
    status = restored.status()
    assert (status.incarnation, status.state, status.outer_step) == (2, RunState.RUNNING, 0)


def test_what_a_peer_only_says_is_no_proof() -> None:
    """A certificate with a forged half vote, and votes of a peer far ahead, prove nothing."""
    lived, restored = history(1), history(1)
    certificate = offer(lived, 2).certificate
    assert certificate is not None
    for vote in certificate.votes:
        if vote.voter == COORDINATOR_VOTER:
            vote.signature = bytes(64)
    contributions = rounds_pb2.Contributions.FromString(certificate.contributions)
    for contribution in contributions.contributions:
        for leased in contribution.ranges:
            leased.lease.signature = bytes(64)
    certificate.contributions = contributions.SerializeToString()
    report(restored, certificate)
    hold(restored, 1)
    assert restored.status().state == RunState.RUNNING and exchange(restored, 2).is_promised
