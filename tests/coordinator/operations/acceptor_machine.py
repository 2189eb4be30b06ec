"""Random ballots for one outer step: two to four members that keep the rules, the real coordinator,
a network that loses and repeats. Members vote as architecture section 5 says; the coordinator is
the production operations over a store.
"""

from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from protos.contract.certificate import half_votes_by_voter, is_quorum
from protos.contract.ids import COORDINATOR_VOTER
from protos.muster.v1 import rounds_pb2
from tests.coordinator.operations.ledger_world import World

MEMBERS = st.integers(0, 3)
"""Modulo the number of members."""
ATTEMPTS = st.integers(0, 2)


@dataclass(slots=True)
class Member:
    """Durable part of one member."""

    promised: int = 0
    vote_attempt: int = -1
    vote_value: bytes = b""


class AcceptorMachine(RuleBasedStateMachine):
    """One outer step."""

    @initialize(num_members=st.integers(2, 4))
    def begin(self, num_members: int) -> None:
        self.world = World.create(num_peers=num_members)
        self.members = [Member() for _ in range(num_members)]
        self.contributions = self.world.one_range()
        self.proposal: dict[int, bytes] = {}
        """Value that the leader of an attempt proposes."""
        self.votes: dict[tuple[int, bytes], dict[str, rounds_pb2.Vote]] = {}
        """Every vote ever sent, by (attempt, value) and voter."""
        self.half_votes = half_votes_by_voter(self.world.directive.roster)

    def some(self, numbers: set[int]) -> list[int]:
        """Members meant by drawn numbers."""
        return sorted({number % len(self.members) for number in numbers})

    def fresh_value(self, attempt: int) -> bytes:
        return self.world.value(self.contributions, outer_step=1, content=b"%d" % attempt)

    @rule()
    def propose_first(self) -> None:
        self.proposal.setdefault(0, self.fresh_value(0))

    @rule(
        attempt=st.integers(1, 2),
        asked=st.sets(MEMBERS, min_size=1),
        asks_coordinator=st.booleans(),
    )
    def propose_later(self, attempt: int, asked: set[int], asks_coordinator: bool) -> None:
        """Exchange among a quorum; the highest vote is proposed again, else something new."""
        if attempt in self.proposal:
            return
        answered: set[str] = set()
        best = (-1, b"")
        for index in self.some(asked):
            member = self.members[index]
            if attempt >= member.promised:
                member.promised = attempt
                answered.add(self.world.keys[index].peer_id)
                best = max(best, (member.vote_attempt, member.vote_value))
        if asks_coordinator:
            response = self.world.exchange(outer_step=1, attempt=attempt)
            if response.certificate is not None:
                best = (attempt, response.certificate.value)
                answered.add(COORDINATOR_VOTER)
            elif response.is_promised:
                answered.add(COORDINATOR_VOTER)
        if is_quorum(answered, self.half_votes):
            self.proposal[attempt] = best[1] if best[0] >= 0 else self.fresh_value(attempt)

    @rule(voters=st.sets(MEMBERS, min_size=1), attempt=ATTEMPTS)
    def vote(self, voters: set[int], attempt: int) -> None:
        value = self.proposal.get(attempt)
        for index in self.some(voters) if value is not None else ():
            member = self.members[index]
            if attempt < member.promised or attempt == member.vote_attempt:
                continue
            member.promised = member.vote_attempt = attempt
            member.vote_value = value
            (ballot,) = self.world.votes(value, [index], attempt=attempt)
            self.votes.setdefault((attempt, value), {})[ballot.voter] = ballot

    @rule(attempt=ATTEMPTS, heard=st.sets(MEMBERS))
    def ask_for_the_half(self, attempt: int, heard: set[int]) -> None:
        """Somebody who heard some of the votes asks the coordinator."""
        value = self.proposal.get(attempt, b"")
        cast = self.votes.get((attempt, value), {})
        names = [self.world.keys[index].peer_id for index in self.some(heard)]
        offered = [cast[name] for name in names if name in cast]
        certificate = self.world.submit(offered, self.contributions).certificate
        if certificate is not None:
            for signature in certificate.votes:
                self.votes.setdefault((certificate.attempt, certificate.value), {})[
                    signature.voter
                ] = rounds_pb2.Vote(voter=signature.voter, signature=signature.signature)

    @rule(first=MEMBERS, asks_coordinator=st.booleans())
    def split(self, first: int, asks_coordinator: bool) -> None:
        """Half of the members vote and are not heard; the others go on; then those votes come
        in.
        """
        count = len(self.members)
        slow = {first % count, (first + count // 2 - 1) % count}
        self.propose_first()
        self.vote(voters=slow, attempt=0)
        others = set(range(count)) - slow
        self.propose_later(attempt=1, asked=others, asks_coordinator=asks_coordinator)
        self.ask_for_the_half(attempt=0, heard=slow)
        self.vote(voters=set(range(count)), attempt=1)

    @invariant()
    def one_value_is_decided(self) -> None:
        decided = {
            value for (_, value), cast in self.votes.items() if is_quorum(cast, self.half_votes)
        }
        with self.world.store.read() as tx:
            stored = tx.certificate("run", 1, 1)
        if stored is not None:
            decided.add(stored.value)
        assert len(decided) <= 1, "two values are decided for one outer step"

    @invariant()
    def the_half_is_never_out_alone(self) -> None:
        for (_, value), cast in self.votes.items():
            if COORDINATOR_VOTER in cast:
                assert is_quorum(cast, self.half_votes), "the coordinator signed before a quorum"
                with self.world.store.read() as tx:
                    assert tx.certificate("run", 1, 1).value == value

    def teardown(self) -> None:
        violations = self.world.verify().violations
        self.world.store.close()
        assert violations == ()
