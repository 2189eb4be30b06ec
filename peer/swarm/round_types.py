"""Words of the round machine: what it is told, what it asks for, what must survive a crash.

Effects of one event are carried out in order, and `Persist` is on disk before the effect after it
begins; a crash between two effects is therefore always safe. Times are monotonic seconds of the
machine's own clock.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from protos.muster.v1 import common_pb2, rounds_pb2


class RoundPhase(StrEnum):
    """Where a member is in the round; the names that people see."""

    FORM = "FORM"
    REDUCE = "REDUCE"
    AGREE = "AGREE"
    NO_QUORUM = "NO_QUORUM"
    DONE = "DONE"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSetup:
    """What is fixed for one (incarnation, outer step)."""

    run_id: str
    incarnation: int
    outer_step: int
    """The step that the round completes."""
    own_peer_id: str
    directive: common_pb2.Directive
    """In force for this step; its roster may join and vote."""
    previous_state_digest: bytes
    num_pieces: int
    """Pieces of the averaged vector."""
    vector_bytes: int = 0
    """Its size as it travels; 0 if nobody needs to know."""
    left_out: frozenset[str] = frozenset()
    """Members that were too slow in past steps: not asked, as long as others have work."""
    on_trial: frozenset[str] = frozenset()
    """Those that are asked again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTiming:
    """Patience in seconds; the shell adapts it to measured rounds."""

    form_wait_seconds: float = 30.0
    """From the first due member until a group forms without the missing."""
    reduce_wait_seconds: float = 30.0
    """From the group until the averaged bytes are there."""
    agree_wait_seconds: float = 6.0
    """From the own vote until the attempt is given up."""
    exchange_wait_seconds: float = 3.0
    """After this the leader of a later attempt also asks the coordinator."""
    rejoin_wait_seconds: float = 2.0
    """Least time that a later attempt waits for joins."""
    resend_seconds: float = 1.0
    """Between repetitions of an unanswered message."""
    grace_seconds: float = 5.0
    """What a member adds to the leader's deadline before it goes on without the leader."""
    is_guessed: bool = False
    """No round was measured yet: averaging may take longer, as long as bytes move."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRecord:
    """What must survive a crash, for one (incarnation, outer step)."""

    incarnation: int
    outer_step: int
    promised_attempt: int = 0
    """No vote in a lower attempt, ever."""
    led_attempt: int = -1
    """Highest attempt led; it and lower ones are never led again."""
    highest_vote: rounds_pb2.Vote | None = None
    contributions: bytes = b""
    """Contributions of that vote's value."""
    next_directive: common_pb2.Signed | None = None
    """Directive that the vote's value names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnContribution:
    """What this member brings; frozen over all attempts of the step. Empty when it has no work."""

    contribution: rounds_pb2.Contribution
    piece_digests: tuple[bytes, ...] = ()
    upload_bytes_per_second: float = 0.0
    """Measured in past rounds, for the size of the slices; 0 if not."""
    download_bytes_per_second: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ContributionVerdict:
    """Outcome of checking a contribution's leases."""

    num_tokens: int
    reason: str
    """Empty if it may be used."""


class RoundChecks(Protocol):
    """Whatever needs keys or signatures, so that the machine itself needs none."""

    def sign_vote(self, value: bytes, attempt: int) -> rounds_pb2.Vote:
        """Own vote; the caller has written it durably before it leaves."""

    def is_valid_vote(self, vote: rounds_pb2.Vote) -> bool:
        """True if the voter has a vote under the directive in force and signed this."""

    def check_certificate(self, certificate: rounds_pb2.Certificate) -> str:
        """Empty if it proves its step under the directive in force, else why not."""

    def check_contribution(self, contribution: rounds_pb2.Contribution) -> ContributionVerdict:
        """Leases, windows above the cursor, tokens within the roster's limit."""

    def check_directive(self, signed: common_pb2.Signed) -> common_pb2.Directive | None:
        """Content, if the coordinator signed it for this run and incarnation."""


# Events ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Received:
    """A message from an authenticated peer."""

    sender: str
    message: rounds_pb2.RoundMessage


@dataclass(frozen=True, slots=True)
class Acked:
    """A peer answered a message."""

    sender: str
    ack: rounds_pb2.RoundAck


@dataclass(frozen=True, slots=True)
class Contributed:
    """The own contribution is there (empty: no work to be had; None: an empty one is withdrawn)."""

    own: OwnContribution | None


@dataclass(frozen=True, slots=True)
class ReduceDone:
    """All averaged bytes of the attempt are here and verified."""

    attempt: int
    averaged_digest: bytes


@dataclass(frozen=True, slots=True)
class TimingLearnt:
    """How long to wait from now on: members have answered since the step began."""

    timing: RoundTiming


@dataclass(frozen=True, slots=True)
class ReduceMoved:
    """Bytes of the attempt's reduction have moved, to or from this member."""

    attempt: int


@dataclass(frozen=True, slots=True)
class ReduceFailed:
    """The reduction of the attempt cannot finish."""

    attempt: int
    reason: str
    peer_id: str = ""
    """Whose fault it looks like, if anybody's."""
    told_by: str = ""
    """A member that had given the attempt up before."""
    is_down: bool = False
    """That member looks dead."""
    is_invalid: bool = False
    """What that member sent breaks the rules."""


@dataclass(frozen=True, slots=True)
class BytesFetched:
    """Averaged bytes with this digest are here and verified."""

    averaged_digest: bytes


@dataclass(frozen=True, slots=True)
class PeerUnreachable:
    """A peer refused connections or did not answer in time, repeatedly."""

    peer_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class PeersLate:
    """A reduction was given up, and it was mostly these members that it waited for."""

    attempt: int
    peer_ids: frozenset[str]
    only_waiting: str = ""
    """The one reducer that did not deliver and said to the end that it waits itself."""


@dataclass(frozen=True, slots=True)
class CoordinatorExchanged:
    """The coordinator's answer to an exchange; None if it cannot be reached."""

    attempt: int
    response: rounds_pb2.CoordinatorExchangeResponse | None


@dataclass(frozen=True, slots=True)
class CoordinatorVoted:
    """The coordinator's answer to submitted votes; None if it cannot be reached."""

    response: rounds_pb2.SubmitVotesResponse | None


@dataclass(frozen=True, slots=True)
class DirectiveKnown:
    """A directive became known; it acts only through a certificate."""

    directive: common_pb2.Signed


@dataclass(frozen=True, slots=True)
class CertificateKnown:
    """A certificate came by another way than a round message."""

    certificate: rounds_pb2.Certificate


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    Received
    | Acked
    | Contributed
    | TimingLearnt
    | ReduceDone
    | ReduceMoved
    | ReduceFailed
    | BytesFetched
    | PeerUnreachable
    | PeersLate
    | CoordinatorExchanged
    | CoordinatorVoted
    | DirectiveKnown
    | CertificateKnown
    | Tick
)


# Effects --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Persist:
    """Write the record durably, then go on."""

    record: RoundRecord


@dataclass(frozen=True, slots=True)
class Send:
    """Deliver a message once to each; losses are the machine's business."""

    peer_ids: tuple[str, ...]
    message: rounds_pb2.RoundMessage


@dataclass(frozen=True, slots=True)
class StartReduce:
    """Average with this group."""

    attempt: int
    group: rounds_pb2.FormGroup


@dataclass(frozen=True, slots=True)
class AbortReduce:
    """Stop averaging for the attempt, if it still runs."""

    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class FetchBytes:
    """Fetch averaged bytes by digest from any of the holders."""

    averaged_digest: bytes
    holders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AskCoordinatorExchange:
    """Ask the coordinator to promise an attempt."""

    attempt: int


@dataclass(frozen=True, slots=True)
class SubmitVotes:
    """Offer the coordinator equal votes that its half would complete."""

    votes: tuple[rounds_pb2.Vote, ...]
    contributions: bytes


@dataclass(frozen=True, slots=True)
class Commit:
    """The step is decided; apply it. The machine is done."""

    certificate: rounds_pb2.Certificate
    next_directive: common_pb2.Signed | None
    """Content of the directive that the value names, if the machine has seen it."""
    holders: tuple[str, ...]
    """Who voted and therefore holds the bytes."""
    attempt: int
    is_own_included: bool
    """True if the own contribution is part of it unchanged."""


@dataclass(frozen=True, slots=True)
class Behind:
    """Somebody speaks of a later step or incarnation, or says that our state differs."""

    peer_id: str
    incarnation: int
    outer_step: int
    reason: str


@dataclass(frozen=True, slots=True)
class ContributionRefused:
    """The leader will not take the own contribution; drop it."""

    reason: str


@dataclass(frozen=True, slots=True)
class AttemptDiscarded:
    """An attempt was given up; nothing has changed."""

    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class PhaseChanged:
    """For people: where the round stands, and why."""

    phase: RoundPhase
    reason: str


Effect = (
    Persist
    | Send
    | StartReduce
    | AbortReduce
    | FetchBytes
    | AskCoordinatorExchange
    | SubmitVotes
    | Commit
    | Behind
    | ContributionRefused
    | AttemptDiscarded
    | PhaseChanged
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A value that may be voted for, with everything needed to check it."""

    value: bytes
    attempt: int
    contributions: bytes
    next_directive: common_pb2.Signed
    holders: Sequence[str] = field(default_factory=tuple)
