"""A world of round machines: virtual time, an unreliable network, crashes, durable storage, a
coordinator.

One outer step is played to its end. `Weakness` leaves out one rule at a time, in the world around
the machine: storage that loses what was written, or a coordinator that signs too early. The machine
itself is never changed.
"""

import hashlib
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from peer.swarm import round_types as rt
from peer.swarm.round_state import RoundMachine
from protos.contract.certificate import certificate_from_votes, half_votes_by_voter, is_quorum
from protos.contract.ids import COORDINATOR_VOTER
from protos.muster.v1 import common_pb2, rounds_pb2

INCARNATION, OUTER_STEP, NUM_PIECES = 1, 1, 4
TIMING = rt.RoundTiming(
    form_wait_seconds=3.0,
    reduce_wait_seconds=3.0,
    agree_wait_seconds=2.0,
    exchange_wait_seconds=1.0,
    rejoin_wait_seconds=0.5,
    resend_seconds=0.5,
    grace_seconds=1.0,
)


class Weakness(Enum):
    """Which rule the world leaves out."""

    NONE = auto()
    VOTE_NOT_DURABLE = auto()
    PROMISE_NOT_DURABLE = auto()
    COORDINATOR_SIGNS_EARLY = auto()


@dataclass(frozen=True)
class World:
    """How bad a world is; drawn from the seed."""

    num_members: int
    loss_ratio: float = 0.0
    duplicate_ratio: float = 0.0
    delay_seconds: float = 0.02
    crashes_per_second: float = 0.0
    reduce_failure_ratio: float = 0.0
    bad_seconds: float = 0.0
    coordinator_down_ratio: float = 0.0
    late_ratio: float = 0.1
    """Share of messages that take `late_factor` times as long."""
    late_factor: float = 40.0
    crash_per_effect_ratio: float = 0.0
    crash_after_promise_ratio: float = 0.0
    restart_seconds: float = 3.0
    due_seconds: float = 2.0
    """A living member has its contribution within this time."""
    cut_ratio: float = 0.0
    """Share of pairs of members that cannot hear each other in the bad time."""
    num_killed_in_reduce: int = 0
    """Members that die for good while the first group averages."""
    num_poisoners: int = 0
    """Members whose bytes break the rules, which everybody who averages with them sees."""
    num_slanderers: int = 0
    """Members that accuse an honest one in every group they are in."""
    left_out_pairs: tuple[tuple[str, str], ...] = ()
    """(who, whom): the first leaves the second out as slow, from the start."""
    is_on_trial: bool = False
    """Who is late once is left out for the rest of the step, not only after twice."""
    timing: rt.RoundTiming = TIMING
    reduce_seconds: tuple[float, ...] = ()
    """How long averaging takes each member of a group, beyond a message's delay."""
    moves_seconds: float = 0.0
    """Between two looks of a member at whether its averaging moves; 0: nobody looks."""
    fetch_seconds: float = 0.0
    """How long averaged bytes take that are fetched whole."""
    blame_ratio: float = 0.0
    """Share of failed reductions for which a member blames another, as slow or as down."""


class Checks:
    """Signatures that are only names: the simulation tests the rules, not Ed25519."""

    def __init__(self, own_peer_id: str, directive: common_pb2.Directive) -> None:
        self._own_peer_id = own_peer_id
        self._half_votes = half_votes_by_voter(directive.roster)

    def sign_vote(self, value: bytes, attempt: int) -> rounds_pb2.Vote:
        return signed_vote(self._own_peer_id, value, attempt)

    def is_valid_vote(self, vote: rounds_pb2.Vote) -> bool:
        return vote.voter in self._half_votes and vote.signature == vote.voter.encode()

    def check_certificate(self, certificate: rounds_pb2.Certificate) -> str:
        voters = [vote.voter for vote in certificate.votes]
        return "" if is_quorum(voters, self._half_votes) else "no quorum"

    def check_contribution(self, contribution: rounds_pb2.Contribution) -> rt.ContributionVerdict:
        tokens = sum(r.end_window - r.begin_window for r in contribution.ranges)
        return rt.ContributionVerdict(num_tokens=tokens, reason="")

    def check_directive(self, signed: common_pb2.Signed) -> common_pb2.Directive | None:
        return common_pb2.Directive.FromString(signed.payload)


def signed_vote(voter: str, value: bytes, attempt: int) -> rounds_pb2.Vote:
    """Vote with its voter's name as signature."""
    return rounds_pb2.Vote(value=value, attempt=attempt, voter=voter, signature=voter.encode())


class Coordinator:
    """The acceptor of weight one half, as architecture section 5 (Quorum) describes it."""

    def __init__(self, directive: common_pb2.Directive) -> None:
        self._half_votes = half_votes_by_voter(directive.roster)
        self.promised_attempt = 0
        self.certificate: rounds_pb2.Certificate | None = None

    def exchange(self, attempt: int) -> rounds_pb2.CoordinatorExchangeResponse:
        if self.certificate is not None:
            return rounds_pb2.CoordinatorExchangeResponse(certificate=self.certificate)
        if attempt < self.promised_attempt:
            return rounds_pb2.CoordinatorExchangeResponse(reason="promised a later attempt")
        self.promised_attempt = attempt
        answer = rounds_pb2.ExchangeAnswer()
        return rounds_pb2.CoordinatorExchangeResponse(answer=answer, is_promised=True)

    def submit(self, effect: rt.SubmitVotes) -> rounds_pb2.SubmitVotesResponse:
        if self.certificate is not None:
            return rounds_pb2.SubmitVotesResponse(certificate=self.certificate)
        first = effect.votes[0]
        own = signed_vote(COORDINATOR_VOTER, first.value, first.attempt)
        votes = [*effect.votes, own]
        if first.attempt < self.promised_attempt:
            return rounds_pb2.SubmitVotesResponse(reason="promised a later attempt")
        if not is_quorum([vote.voter for vote in votes], self._half_votes):
            return rounds_pb2.SubmitVotesResponse(reason="no quorum with the half vote")
        self.certificate = certificate_from_votes(votes, effect.contributions)
        return rounds_pb2.SubmitVotesResponse(certificate=self.certificate)


@dataclass
class Member:
    """One member: a machine that crashes, and what survives it."""

    peer_id: str
    machine: RoundMachine | None = None
    record: rt.RoundRecord = field(
        default_factory=lambda: rt.RoundRecord(incarnation=INCARNATION, outer_step=OUTER_STEP)
    )
    bytes_held: set[bytes] = field(default_factory=set)
    fetching: set[bytes] = field(default_factory=set)
    certificate: rounds_pb2.Certificate | None = None
    life: int = 0
    is_dead: bool = False
    num_reductions: int = 0


class Simulation:
    """Plays one outer step; `values` collects what any certificate anywhere decided."""

    def __init__(self, seed: int, world: World, weakness: Weakness = Weakness.NONE) -> None:
        self._rng = random.Random(seed)
        self._world, self._weakness = world, weakness
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._num_queued = 0
        self.now_seconds = 0.0
        peers = [f"peer{i}" for i in range(world.num_members)]
        roster = [
            common_pb2.RosterEntry(
                peer_id=p, has_vote=True, round_tokens=10, can_accept_connections=True
            )
            for p in peers
        ]
        self.directive = common_pb2.Directive(incarnation=1, directive_number=1, roster=roster)
        self._signed = common_pb2.Signed(payload=self.directive.SerializeToString())
        self.members = {p: Member(p) for p in peers}
        self.coordinator = Coordinator(self.directive)
        self._reducing: dict[bytes, set[str]] = {}
        pairs = [frozenset((p, q)) for p in peers for q in peers if p < q]
        drawn = self._rng.sample(peers, world.num_poisoners + world.num_slanderers)
        self.poisoners = set(drawn[: world.num_poisoners])
        self.slanderers = set(drawn[world.num_poisoners :])
        self._cut = {pair for pair in pairs if self._rng.random() < world.cut_ratio}
        self.values: set[bytes] = set()
        self.num_attempts_discarded = 0
        self.killed_seconds = 0.0
        for peer in peers:
            self._start(peer)

    # World ------------------------------------------------------------------------------------

    @property
    def is_bad(self) -> bool:
        return self.now_seconds < self._world.bad_seconds

    def _at(self, delay_seconds: float, action: Callable[[], None]) -> None:
        self._num_queued += 1
        item = (self.now_seconds + delay_seconds, self._num_queued, action)
        heapq.heappush(self._queue, item)

    def _delay_seconds(self) -> float:
        delay = self._rng.expovariate(1 / self._world.delay_seconds)
        is_late = self.is_bad and self._rng.random() < self._world.late_ratio
        return delay * self._world.late_factor if is_late else delay

    def run(self, until_seconds: float) -> None:
        """Play until every member has the certificate, two values were decided, or time is over."""
        while self._queue and self.now_seconds < until_seconds and len(self.values) < 2:
            if all(m.certificate is not None or m.is_dead for m in self.members.values()):
                return
            self.now_seconds, _, action = heapq.heappop(self._queue)
            action()

    def _start(self, peer: str) -> None:
        member = self.members[peer]
        member.life += 1
        member.fetching.clear()
        setup = rt.RoundSetup(
            run_id="sim",
            incarnation=INCARNATION,
            outer_step=OUTER_STEP,
            own_peer_id=peer,
            directive=self.directive,
            previous_state_digest=b"state 0",
            num_pieces=NUM_PIECES,
            left_out=frozenset(q for p, q in self._world.left_out_pairs if p == peer),
            on_trial=frozenset(self.members if self._world.is_on_trial else ()) - {peer},
        )
        member.machine = RoundMachine(
            setup=setup,
            checks=Checks(peer, self.directive),
            timing=self._world.timing,
            record=member.record,
            newest_directive=self._signed,
            now_seconds=self.now_seconds,
        )
        for digest in member.bytes_held:
            member.machine.hold_bytes(digest)
        self._at(
            self._rng.uniform(0, self._world.due_seconds),
            self._living(peer, lambda: self._contribute(peer)),
        )
        self._at(0.0, self._living(peer, lambda: self._tick(peer)))

    def _living(self, peer: str, action: Callable[[], None]) -> Callable[[], None]:
        life = self.members[peer].life

        def guarded() -> None:
            member = self.members[peer]
            if member.machine is not None and member.life == life:
                action()

        return guarded

    def _contribute(self, peer: str) -> None:
        windows = self._rng.choice([0, 10, 10])
        if self.poisoners or self.slanderers:
            windows = 10  # a liar that alone has work can only be waited out
        ranges = [rounds_pb2.LeasedRange(begin_window=0, end_window=windows)] if windows else []
        own = rounds_pb2.Contribution(
            peer_id=peer, ranges=ranges, loss_nats=self.members[peer].life
        )
        digests = (b"d",) * NUM_PIECES if windows else ()
        event = rt.Contributed(rt.OwnContribution(contribution=own, piece_digests=digests))
        self._tell(peer, event)
        if not windows:
            self._at(8.0, self._living(peer, lambda: self._contribute(peer)))

    def _tick(self, peer: str) -> None:
        if self.is_bad and self._rng.random() < self._world.crashes_per_second * 0.25:
            self._crash(peer)
            return
        self._tell(peer, rt.Tick())
        self._at(0.25, self._living(peer, lambda: self._tick(peer)))

    def _crash(self, peer: str) -> None:
        member = self.members[peer]
        member.machine = None
        member.life += 1
        if self._weakness is Weakness.VOTE_NOT_DURABLE:
            member.record = replace(
                member.record, highest_vote=None, contributions=b"", next_directive=None
            )
        if self._weakness is Weakness.PROMISE_NOT_DURABLE:
            voted = member.record.highest_vote
            promised = 0 if voted is None else voted.attempt
            member.record = replace(member.record, promised_attempt=promised)
        self._at(self._rng.uniform(0.05, self._world.restart_seconds), lambda: self._start(peer))

    # Machine <-> world ------------------------------------------------------------------------

    def _tell(self, peer: str, event: rt.Event) -> None:
        member = self.members[peer]
        if member.machine is None or member.certificate is not None:
            return
        effects = member.machine.handle(event, now_seconds=self.now_seconds)
        for effect in effects:
            if self.is_bad and self._rng.random() < self._world.crash_per_effect_ratio:
                self._crash(peer)
                return
            self._do(member, effect)
        has_promised = any(isinstance(e, rt.Persist) and e.record.led_attempt < 0 for e in effects)
        ratio = self._world.crash_after_promise_ratio
        if has_promised and self.is_bad and self._rng.random() < ratio:
            self._crash(peer)

    def _do(self, member: Member, effect: rt.Effect) -> None:
        peer = member.peer_id
        match effect:
            case rt.Persist():
                self._persist(member, effect.record)
            case rt.Send():
                for other in effect.peer_ids:
                    self._send(peer, other, effect.message)
            case rt.StartReduce():
                self._reduce(peer, effect)
            case rt.FetchBytes():
                if effect.averaged_digest not in member.fetching:
                    member.fetching.add(effect.averaged_digest)
                    seconds = self._delay_seconds() + self._world.fetch_seconds
                    self._at(seconds, self._living(peer, lambda: self._fetch(peer, effect)))
            case rt.AskCoordinatorExchange():
                self._ask(lambda: self._exchange(peer, effect.attempt))
            case rt.SubmitVotes():
                self._ask(lambda: self._submit(peer, effect))
            case rt.Commit():
                member.certificate = effect.certificate
                self.values.add(effect.certificate.value)
            case rt.AttemptDiscarded():
                self.num_attempts_discarded += 1
            case rt.ContributionRefused():  # the trainer makes another one
                self._at(2.0, self._living(peer, lambda: self._contribute(peer)))

    def _persist(self, member: Member, record: rt.RoundRecord) -> None:
        old = member.record.highest_vote
        member.record = record
        vote = record.highest_vote
        is_early = self._weakness is Weakness.COORDINATOR_SIGNS_EARLY
        if is_early and vote is not None and vote != old:
            self._ask(lambda: self._sign_early(member.peer_id, vote))

    def _sign_early(self, peer: str, vote: rounds_pb2.Vote) -> None:
        """The rule left out: sign what is shown at once, store nothing."""
        if vote.attempt >= self.coordinator.promised_attempt:
            own = signed_vote(COORDINATOR_VOTER, vote.value, vote.attempt)
            message = rounds_pb2.RoundMessage(
                incarnation=INCARNATION, outer_step=OUTER_STEP, attempt=vote.attempt, vote=own
            )
            for other in self.members:
                self._send(peer, other, message)

    def _send(self, sender: str, receiver: str, message: rounds_pb2.RoundMessage) -> None:
        copies = 1
        if self.is_bad and self._rng.random() < self._world.duplicate_ratio:
            copies = 2
        for _ in range(copies):
            if not (self.is_bad and self._rng.random() < self._world.loss_ratio):
                self._at(self._delay_seconds(), lambda: self._deliver(sender, receiver, message))

    def _deliver(self, sender: str, receiver: str, message: rounds_pb2.RoundMessage) -> None:
        member = self.members[receiver]
        is_cut = self.is_bad and frozenset((sender, receiver)) in self._cut
        if member.machine is None or is_cut:
            if self._rng.random() < 0.5:
                self._tell(sender, rt.PeerUnreachable(receiver, "refused"))
            return
        if member.certificate is not None:
            if message.WhichOneof("body") != "certificate":
                answer = rounds_pb2.RoundMessage(
                    incarnation=INCARNATION, outer_step=OUTER_STEP, certificate=member.certificate
                )
                self._send(receiver, sender, answer)
            return
        self._tell(receiver, rt.Received(sender, message))
        ack = rounds_pb2.RoundAck(incarnation=INCARNATION, outer_step=OUTER_STEP - 1)
        self._at(self._delay_seconds(), lambda: self._tell(sender, rt.Acked(receiver, ack)))

    def _reduce(self, peer: str, effect: rt.StartReduce) -> None:
        self.members[peer].num_reductions += 1
        key = effect.group.SerializeToString() + effect.attempt.to_bytes(4, "big")
        started = self._reducing.setdefault(key, set())
        started.add(peer)
        if started != {member.contribution.peer_id for member in effect.group.members}:
            return
        digest = hashlib.sha256(key).digest()
        if self._world.num_killed_in_reduce and not self.killed_seconds:
            self._kill_some(sorted(started), effect.attempt)
            return
        if self._is_spoilt(started, effect):
            return
        for index, member in enumerate(sorted(started)):
            is_failing = self.is_bad and self._rng.random() < self._world.reduce_failure_ratio
            event: rt.Event = rt.ReduceDone(effect.attempt, digest)
            if is_failing:
                event = self._failed(member, effect.attempt, sorted(started - {member}))
            seconds = self._world.reduce_seconds[index] if self._world.reduce_seconds else 0.0
            seconds += self._delay_seconds()
            self._at(seconds, self._finishing(member, event, digest))
            longest_seconds = max(self._world.reduce_seconds, default=0.0)  # it serves the others
            self._move(member, effect.attempt, until_seconds=self.now_seconds + longest_seconds)

    def _move(self, peer: str, attempt: int, *, until_seconds: float) -> None:
        """Bytes keep moving until a member's averaging is done."""
        seconds = self._world.moves_seconds

        def move() -> None:
            self._tell(peer, rt.ReduceMoved(attempt))
            self._move(peer, attempt, until_seconds=until_seconds)

        if seconds and self.now_seconds + seconds < until_seconds:
            self._at(seconds, self._living(peer, move))

    def _failed(self, peer: str, attempt: int, others: list[str]) -> rt.ReduceFailed:
        """How a reduction fails at a member, which may have waited for another most of the time."""
        ratio = self._world.blame_ratio
        if not others or not ratio or self._rng.random() >= ratio:
            return rt.ReduceFailed(attempt, "simulated")
        blamed = self._rng.choice(others)
        if self._rng.random() < 0.5:
            self._tell(peer, rt.PeersLate(attempt, frozenset((blamed,))))
            return rt.ReduceFailed(attempt, "simulated")
        is_down = self._rng.random() < 0.5
        return rt.ReduceFailed(attempt, f"{blamed} is silent", blamed, is_down=is_down)

    def _is_spoilt(self, started: set[str], effect: rt.StartReduce) -> bool:
        """True if somebody in the group spoils the reduction; everybody has heard of it then."""
        with_values = {m.contribution.peer_id for m in effect.group.members if m.piece_digests}
        bad = sorted(self.poisoners & with_values)
        slanderers = sorted(self.slanderers & started)
        if not bad and not (slanderers and started - self.slanderers):
            return False
        for member in sorted(started):
            honest = sorted(started - self.poisoners - self.slanderers - {member})
            accused = (self._rng.choice(bad) if bad else "") if member not in self.poisoners else ""
            if member in self.slanderers:
                accused = self._rng.choice(honest) if honest else ""
            event = rt.ReduceFailed(
                effect.attempt, f"bad bytes of {accused}", accused, is_invalid=bool(accused)
            )
            if accused or bad:
                self._at(self._delay_seconds(), self._finishing(member, event, b""))
        return True

    def _kill_some(self, group: list[str], attempt: int) -> None:
        """Some of a group die at once; the others lose their connections to them."""
        self.killed_seconds = self.now_seconds
        killed = self._rng.sample(group, self._world.num_killed_in_reduce)
        for peer in killed:
            self.members[peer].machine, self.members[peer].is_dead = None, True
            self.members[peer].life += 1
        for peer in sorted(set(group) - set(killed)):
            event = rt.ReduceFailed(attempt, "stream ended early")
            self._at(self._delay_seconds(), self._finishing(peer, event, b""))

    def _finishing(self, peer: str, event: rt.Event, digest: bytes) -> Callable[[], None]:
        def finish() -> None:
            if isinstance(event, rt.ReduceDone):
                self.members[peer].bytes_held.add(digest)
            self._tell(peer, event)

        return self._living(peer, finish)

    def _fetch(self, peer: str, effect: rt.FetchBytes) -> None:
        digest = effect.averaged_digest
        self.members[peer].fetching.discard(digest)
        holders = [self.members[p] for p in effect.holders if p in self.members]
        if any(h.machine is not None and digest in h.bytes_held for h in holders):
            self.members[peer].bytes_held.add(digest)
            self._tell(peer, rt.BytesFetched(digest))

    def _ask(self, action: Callable[[], None]) -> None:
        if self.is_bad and self._rng.random() < self._world.coordinator_down_ratio:
            return
        self._at(self._delay_seconds(), action)

    def _exchange(self, peer: str, attempt: int) -> None:
        response = self.coordinator.exchange(attempt)
        if self._weakness is Weakness.PROMISE_NOT_DURABLE:  # it restarts after every promise
            self.coordinator.promised_attempt = 0
        event = rt.CoordinatorExchanged(attempt, response)
        self._at(self._delay_seconds(), lambda: self._tell(peer, event))

    def _submit(self, peer: str, effect: rt.SubmitVotes) -> None:
        response = self.coordinator.submit(effect)
        if self.coordinator.certificate is not None:
            self.values.add(self.coordinator.certificate.value)
        if not (self.is_bad and self._rng.random() < self._world.loss_ratio):
            self._at(self._delay_seconds(), lambda: self._tell(peer, rt.CoordinatorVoted(response)))
