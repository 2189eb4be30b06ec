"""The daemon's calls to the coordinator, each a task that ends in an event for the session machine.

Nothing here decides when to call; the machine does. What comes back is split: the machine gets what
decisions need, the swarm process gets the signed bytes. Errors become events too: unreachable is
normal, a refusal may mean a new Join or the end.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from peer import session_events as ev
from peer.coordinator_client import (
    CLOCK_REFUSE_SECONDS,
    CLOCK_WARN_SECONDS,
    CallResult,
    ClockOffset,
    CoordinatorClient,
    check_clock,
)
from peer.daemon.duties import DUTY_KINDS
from peer.daemon.membership import Membership
from peer.daemon.outbox import CertificateKey, Outbox
from peer.daemon.reports import SessionNumbers
from peer.lease_holdings import GrantedLease
from peer.metrics import PeerMetrics
from protos.contract.certificate import Tag
from protos.contract.errors import ErrorCode, MusterError, RefusedError, UnavailableError
from protos.contract.signing import has_valid_signature
from protos.contract.telemetry import PEER_RPC_SECONDS, LogField
from protos.muster.v1 import (
    common_pb2,
    duties_pb2,
    leases_pb2,
    membership_pb2,
    rounds_pb2,
)

_LOGGER = logging.getLogger(__name__)
_LEASE_RETRY_SECONDS = 5.0
_RELEASE_RETRY_SECONDS = 60.0
_REPORT_PAUSE_SECONDS = 1.0
_MAX_DEADLINES_MISSED = 2
_MAX_CLOCKS_REFUSED = 3
"""Heartbeats in a row with a clock that is too far off, after which the session ends."""
_ENDING_CODES = frozenset(
    {ErrorCode.PEER_EVICTED, ErrorCode.CLOCK_SKEW, ErrorCode.PROTOCOL_MISMATCH}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseBytes:
    """A lease in the form in which others want it."""

    signed: bytes
    lease: common_pb2.Lease


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """How calls reach the rest of the daemon."""

    feed: Callable[[ev.Event], None]
    keep_membership: Callable[[Membership], None]
    """The membership changed: remember it, tell the swarm process."""
    pass_certificates: Callable[[list[bytes]], None]
    """Stored certificates that this peer lacks, for the swarm process."""
    pass_directive: Callable[[common_pb2.Signed], None]
    """A newer directive than the one in force, for the swarm process."""
    acknowledge: Callable[[list[CertificateKey]], None]
    """The coordinator stores these."""
    note: Callable[[str], None]
    """A warning for the owner."""
    keep_trial: Callable[[float, str, int], None]
    """Which duty (id, fence) a heartbeat sent then (monotonic seconds) found to be the peer's."""


class CoordinatorTasks:
    """Calls of one session."""

    def __init__(
        self,
        client: CoordinatorClient,
        *,
        numbers: SessionNumbers,
        outbox: Outbox,
        hooks: Hooks,
    ) -> None:
        self._client = client
        self._numbers = numbers
        self._outbox = outbox
        self._hooks = hooks
        self._has_warned_of_clock = False
        self._num_clocks_refused = 0
        self._has_certificates = asyncio.Event()
        self.lease_by_number: dict[int, LeaseBytes] = {}
        """Leases of the current incarnation, for the trainer."""
        self.duty_by_id: dict[str, duties_pb2.Duty] = {}

    async def heartbeat(
        self, action: ev.SendHeartbeat, current_membership: Callable[[], Membership]
    ) -> None:
        """One heartbeat and everything that its answer sets off."""
        membership = current_membership()
        send_seconds = time.monotonic()
        attestations = self._outbox.attestations()
        has_lost_state, self._outbox.has_lost_state = self._outbox.has_lost_state, False
        request = membership_pb2.HeartbeatRequest(
            claims=self._numbers.claims(),
            attestations=attestations,
            lease_numbers=action.lease_numbers,
            directive_number=membership.directive_number,
            incarnation=membership.incarnation,
            addresses=self._numbers.addresses,
            has_lost_state=has_lost_state,
            duty_id=action.duty_id,
            duty_fence=action.duty_fence,
        )
        try:
            response, clock = await self._client.heartbeat(request)
        except MusterError as error:
            self._outbox.has_lost_state |= has_lost_state
            self._hooks.feed(ev.HeartbeatFailed(reason=error.found))
            self.note_refusal(error)
            return
        self._outbox.acknowledge_attestations(attestations)
        self.note_clock(clock)
        membership = current_membership()
        updated = membership.updated(response)
        if updated.response != membership.response:
            self._hooks.keep_membership(updated)
        if response.certificates:
            self._hooks.pass_certificates([c.SerializeToString() for c in response.certificates])
        for number in response.lost_lease_numbers:
            self.lease_by_number.pop(number, None)
        interval = response.heartbeat_interval_duration
        self._hooks.feed(
            ev.HeartbeatAnswered(
                heartbeat_interval_seconds=interval.seconds + interval.nanos / 1e9,
                lost_lease_numbers=tuple(response.lost_lease_numbers),
                is_run_over=response.is_run_over,
                run_reason=f"run {response.run_state}: {response.run_state_reason}",
            )
        )
        self._hooks.keep_trial(send_seconds, response.duty.duty_id, response.duty.fence)
        if response.HasField("duty"):
            self._offer_duty(response.duty)

    async def parting_duty(
        self, membership: Membership, held: duties_pb2.Duty | None = None
    ) -> duties_pb2.Duty | None:
        """What is owed before this peer leaves, which its state DRAINING says: a checkpoint, if
        nobody else holds the newest state. `held` is renewed. Raises MusterError.
        """
        attestations = self._outbox.attestations()
        request = membership_pb2.HeartbeatRequest(
            claims=self._numbers.claims(),
            attestations=attestations,
            directive_number=membership.directive_number,
            incarnation=membership.incarnation,
            addresses=self._numbers.addresses,
            has_lost_state=self._outbox.has_lost_state,
            duty_id=held.duty_id if held is not None else "",
            duty_fence=held.fence if held is not None else 0,
        )
        response, _ = await self._client.heartbeat(request)
        self._outbox.acknowledge_attestations(attestations)
        duty = response.duty if response.HasField("duty") else None
        is_checkpoint = duty is not None and duty.kind == duties_pb2.DUTY_KIND_CHECKPOINT
        return duty if is_checkpoint else None

    def _offer_duty(self, duty: duties_pb2.Duty) -> None:
        kind = DUTY_KINDS.get(duty.kind)
        if kind is None:
            _LOGGER.warning(
                "%s=%s of unknown kind %d ignored", LogField.DUTY, duty.duty_id, duty.kind
            )
            return
        self.duty_by_id[duty.duty_id] = duty
        self._hooks.feed(
            ev.DutyOffered(
                duty_id=duty.duty_id,
                fence=duty.fence,
                kind=kind,
                min_outer_step=duty.min_outer_step,
            )
        )

    async def acquire_leases(self, action: ev.AcquireLeases, membership: Membership) -> None:
        """Ask for work; leases that the coordinator did not sign for this peer are refused."""
        request = leases_pb2.AcquireLeasesRequest(
            incarnation=action.incarnation,
            wanted_tokens=action.wanted_tokens,
            held_tokens=action.held_tokens,
        )
        try:
            response = await self._client.acquire_leases(
                request, retry_seconds=_LEASE_RETRY_SECONDS
            )
        except MusterError as error:
            self._hooks.feed(ev.LeasesNotGranted(reason=error.found))
            self.note_refusal(error)
            return
        granted = []
        for signed in response.leases:
            lease = common_pb2.Lease.FromString(signed.payload)
            if not self._is_own_lease(signed, lease, membership):
                _LOGGER.warning(
                    "%s=%d refused: not signed for this peer", LogField.LEASE, lease.lease_number
                )
                continue
            if lease.incarnation == self._numbers.incarnation:
                kept = LeaseBytes(signed=signed.SerializeToString(), lease=lease)
                self.lease_by_number[lease.lease_number] = kept
            granted.append(
                GrantedLease(
                    lease_number=lease.lease_number,
                    begin_window=lease.range.begin_window,
                    end_window=lease.range.end_window,
                    tokens_per_window=membership.spec.model.seq_len,
                )
            )
        self._hooks.feed(
            ev.LeasesGranted(
                incarnation=action.incarnation,
                leases=tuple(granted),
                reason=response.reason,
                is_budget_exhausted=response.is_budget_exhausted,
            )
        )

    def _is_own_lease(
        self, signed: common_pb2.Signed, lease: common_pb2.Lease, membership: Membership
    ) -> bool:
        key = membership.response.coordinator_public_key
        is_signed = has_valid_signature(key, Tag.LEASE, signed.payload, signed.signature)
        holder = (lease.run_id, lease.peer_id)
        return is_signed and holder == (self._numbers.run_id, self._numbers.peer_id)

    async def release_leases(self, action: ev.ReleaseLeases) -> None:
        """Return leases; if nobody hears it they expire, since they are not renewed."""
        request = leases_pb2.ReleaseLeasesRequest(
            incarnation=self._numbers.incarnation,
            lease_numbers=action.lease_numbers,
            reason=action.reason[:500],
        )
        for number in action.lease_numbers:
            self.lease_by_number.pop(number, None)
        try:
            await self._client.release_leases(request, retry_seconds=_RELEASE_RETRY_SECONDS)
        except MusterError as error:
            _LOGGER.info("leases %s not released: %s", list(action.lease_numbers), error.found)
            self.note_refusal(error)

    def add_certificates(self, certificates: list[bytes]) -> None:
        """Report these as soon as possible."""
        for certificate in certificates:
            self._outbox.add_certificate(certificate)
        if self._outbox.num_certificates:
            self._has_certificates.set()

    async def report_for_ever(self) -> None:
        """Report certificates while there are any; a failed call is made again after a pause."""
        while True:
            await self._has_certificates.wait()
            if not await self.report_once():
                await asyncio.sleep(_REPORT_PAUSE_SECONDS)
            if not self._outbox.num_certificates:
                self._has_certificates.clear()

    async def report_once(self) -> bool:
        """Report the oldest certificates; False if nothing came of it."""
        batch = self._outbox.next_report()
        try:
            response = await self._client.report_certificates([cert for _, cert in batch])
        except UnavailableError:
            return False
        except MusterError as error:
            self.note_refusal(error)
            if error.code in (ErrorCode.STALE_INCARNATION, ErrorCode.CERTIFICATE_INVALID):
                for key, _ in batch:
                    self._outbox.settle_certificate(key)
            _LOGGER.warning("certificates were refused: %s", error)
            return False
        if response.HasField("directive"):
            self._hooks.pass_directive(response.directive)
        stored = []
        for (key, _), receipt in zip(batch, response.receipts, strict=False):
            if receipt.is_stored:
                stored.append(key)
            else:
                _LOGGER.info("certificate of step %d not stored: %s", key[1], receipt.reason)
            if receipt.is_stored or key[0] < self._numbers.incarnation:
                self._outbox.settle_certificate(key)
        self._numbers.unreported_certificates = self._outbox.num_certificates
        if stored:
            self._hooks.acknowledge(stored)
        return bool(stored)

    async def answer_swarm(self, method: str, request: bytes) -> bytes | None:
        """Make a call for the swarm process; None if it got no answer."""
        try:
            if method == "exchange":
                exchange = rounds_pb2.CoordinatorExchangeRequest.FromString(request)
                return bytes((await self._client.exchange(exchange)).SerializeToString())
            votes = rounds_pb2.SubmitVotesRequest.FromString(request)
            return bytes((await self._client.submit_votes(votes)).SerializeToString())
        except MusterError as error:
            _LOGGER.info("%s: %s", method, error.found)
            self.note_refusal(error)
            return None

    def note_refusal(self, error: MusterError) -> None:
        """A refusal that concerns the session as a whole becomes an event."""
        if not isinstance(error, RefusedError):
            return
        if error.code is ErrorCode.SESSION_INVALID:
            self._hooks.feed(ev.SessionRefused(reason=error.found))
        elif error.code in _ENDING_CODES:
            self._hooks.feed(ev.StopRequested(reason=str(error), exit_code=error.exit_code))

    def note_clock(self, clock: ClockOffset) -> None:
        """Keep the measured offset; warn once while it is large, end the session if it stays too
        large: one heartbeat may meet a clock that is just being corrected.
        """
        self._numbers.clock_offset_seconds = clock.offset_seconds
        is_far_off = clock.certain_seconds > CLOCK_WARN_SECONDS
        if is_far_off and not self._has_warned_of_clock:
            self._hooks.note(
                f"this clock differs from the coordinator's by {clock.offset_seconds:+.2f} s; "
                f"at {CLOCK_REFUSE_SECONDS} s this peer must leave: synchronise it "
                "(timedatectl set-ntp true, or chronyc makestep)"
            )
        self._has_warned_of_clock = is_far_off
        try:
            check_clock(clock)
            self._num_clocks_refused = 0
        except RefusedError as error:
            self._num_clocks_refused += 1
            if self._num_clocks_refused >= _MAX_CLOCKS_REFUSED:
                self._hooks.feed(ev.StopRequested(reason=str(error), exit_code=error.exit_code))


class CallObserver:
    """Turns the outcomes of calls into metrics and into one fact: can the coordinator be
    reached.
    """

    def __init__(self, metrics: PeerMetrics, feed: Callable[[ev.Event], None]) -> None:
        self._metrics = metrics
        self._feed = feed
        self._num_deadlines_missed = 0

    def __call__(self, result: CallResult) -> None:
        """Take in one attempt. One missed deadline alone is no proof of absence on a busy
        machine.
        """
        labels = {"method": result.method, "status": result.status}
        self._metrics.observe(PEER_RPC_SECONDS, result.seconds, labels)
        if result.is_answered:
            self._num_deadlines_missed = 0
            self._feed(ev.CoordinatorReachable(is_reachable=True, reason="it answers"))
            return
        if result.status == "DEADLINE_EXCEEDED":
            self._num_deadlines_missed += 1
            if self._num_deadlines_missed < _MAX_DEADLINES_MISSED:
                return
        self._feed(ev.CoordinatorReachable(is_reachable=False, reason=result.reason))
