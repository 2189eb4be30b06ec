"""Random lives of a swarm, for Hypothesis: joins, restarts, exits, silence, rounds, coordinator
restarts, in any order.

Whatever happens: every roster after the start has a voter, votes are of live members or of members
about to be missed, numbers only rise, and the ledger's verifier finds the books right. At the end,
with two peers back for good, the run goes on.
"""

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from coordinator.domain.policy import SwarmPolicy
from coordinator.operations import ledger_verify, membership, rounds
from coordinator.operations.common import BeginRecovery, begin_recovery
from coordinator.operations.requests import PeerExitedRequest
from coordinator.operations.requests_ledger import VerifyLedgerRequest
from protos.contract.telemetry import RunState
from protos.muster.v1 import common_pb2
from tests.coordinator.operations.swarm_world import RUN_ID, SwarmWorld

PEERS = st.integers(0, 3)
COMMITS: list[int] = []
"""One entry for each round of all histories."""
SETTINGS = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def voters_in_force(world: SwarmWorld) -> set[str]:
    """Members with a vote under the directive that decides the next step."""
    with world.store.read() as tx:
        number = rounds.chain_head(tx, tx.run(RUN_ID)).directive_number
        row = tx.directive(RUN_ID, number)
    roster = common_pb2.Directive.FromString(row.payload).roster
    return {entry.peer_id for entry in roster if entry.has_vote}


class SwarmMachine(RuleBasedStateMachine):
    """Four scripted peers; one that is in `world.peers` is running."""

    def __init__(self) -> None:
        super().__init__()
        self.world = SwarmWorld.create(
            budget_windows=320, policy=SwarmPolicy(checkpoint_interval_seconds=1e6)
        )
        self.numbers = (0, 0)
        self.world.start(2)

    def running(self, index: int) -> bool:
        return any(peer.index == index for peer in self.world.peers)

    @rule(index=PEERS, lost_steps=st.integers(0, 3))
    def join(self, index: int, lost_steps: int) -> None:
        """A start or a restart; what was on disk may be some steps old."""
        old = next((peer for peer in self.world.peers if peer.index == index), None)
        self.world.join(index)
        if old is not None:
            peer = self.world.peer(index)
            peer.incarnation = old.incarnation
            peer.outer_step = max(old.outer_step - lost_steps, 0)

    @rule(index=PEERS)
    def beat(self, index: int) -> None:
        """What a daemon does: hear the news, fetch the newest state from a running member, attest
        it.
        """
        if not self.running(index):
            return
        self.world.beat(index)
        peer = self.world.peer(index)
        peer.outer_step = max(
            one.outer_step for one in self.world.peers if one.incarnation == peer.incarnation
        )
        self.world.attest(index)

    @rule(index=PEERS, is_polite=st.booleans())
    def end(self, index: int, is_polite: bool) -> None:
        if not self.running(index):
            return
        if is_polite:
            self.world.leave(index)
            return
        request = PeerExitedRequest(peer_id=self.world.id_of(index), reason="killed")
        self.world.do(membership.peer_exited, request)
        self.world.peers.remove(self.world.peer(index))

    @rule(num_survivors=st.integers(0, 1), is_seen=st.booleans())
    def catastrophe(self, num_survivors: int, is_seen: bool) -> None:
        """A power cut; those who come back have what was on their disks."""
        for peer in self.world.peers[num_survivors:]:
            if is_seen:
                self.end(peer.index, is_polite=False)
            else:
                self.vanish(peer.index)

    @rule(index=PEERS)
    def vanish(self, index: int) -> None:
        """Nobody sees it end."""
        if self.running(index):
            self.world.peers.remove(self.world.peer(index))

    @rule()
    def round(self) -> None:
        """A round of everybody that holds the newest state, if it is a quorum of the roster in
        force.
        """
        with self.world.store.read() as tx:
            run, book = tx.run(RUN_ID), tx.book(RUN_ID)
        voters = voters_in_force(self.world)
        group = [
            peer.index
            for peer in self.world.peers
            if peer.peer_id in voters
            and (peer.incarnation, peer.outer_step) == (run.incarnation, book.certified_outer_step)
        ]
        is_quorum = len(group) > len(voters) // 2
        if run.incarnation and run.state == RunState.RUNNING and is_quorum:
            self.world.commit(group, num_windows=1)
            COMMITS.append(1)

    @rule(seconds=st.sampled_from([0.5, 3.0, 11.0, 30.0, 70.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.tick(seconds)

    @rule(num_rounds=st.integers(2, 4))
    def work(self, num_rounds: int) -> None:
        """Nothing goes wrong for a while; somebody comes back if nobody is there."""
        if not self.world.peers:
            self.join(0, lost_steps=1)
        for _ in range(num_rounds):
            for index in range(4):
                self.beat(index)
            self.world.tick(3.0)
            self.round()

    @rule(index=PEERS)
    def come_and_work(self, index: int) -> None:
        if not self.running(index):
            self.join(index, lost_steps=1)
        self.work(num_rounds=4)

    @rule()
    def restart_coordinator(self) -> None:
        self.world.do(begin_recovery, BeginRecovery(seconds=30.0))

    @invariant()
    def rosters_have_voters_and_numbers_rise(self) -> None:
        status = self.world.status()
        numbers = (status.incarnation, status.directive_number)
        assert numbers >= self.numbers
        self.numbers = numbers
        if status.incarnation:
            assert self.world.voters(), "a roster without voters can never be left"

    def teardown(self) -> None:
        """Two fresh peers stay: the run must go on from whatever is left, or wait with a reason."""
        found = self.world.do(ledger_verify.verify_ledger, VerifyLedgerRequest(run_id=RUN_ID))
        assert found.violations == ()
        self.world.peers.clear()
        self.world.now += 200.0
        self.world.tick()
        for index in (0, 1):
            self.world.join(index)
        for _ in range(12):
            self.world.now += 10.0
            for index in (0, 1):
                self.beat(index)
            self.world.tick()
        status = self.world.status()
        is_complete = status.credited_tokens == status.budget_tokens
        allowed = (RunState.RUNNING, RunState.FINISHED) if is_complete else (RunState.RUNNING,)
        assert status.state in allowed, status.state_reason


def test_random_lives_keep_rosters_and_books_right() -> None:
    COMMITS.clear()
    run_state_machine_as_test(SwarmMachine, settings=SETTINGS)
    assert len(COMMITS) > 100, f"only {len(COMMITS)} rounds in all histories"
