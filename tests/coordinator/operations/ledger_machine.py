"""Random histories of one run, for Hypothesis: grants, partial rounds, expiry, late and repeated
reports in any order, releases, rollbacks, restarts. Invariants 1 to 3 are checked after every step
against a plain per-window model that is told only what peers saw, and at the end by the ledger's
own verifier.
"""

from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coordinator.operations.common import BeginRecovery, begin_recovery
from protos.muster.v1 import common_pb2, rounds_pb2
from tests.coordinator.operations.ledger_world import RUN_ID, SEQ_LEN, World, lease_of

NUM_PEERS = 3
PEERS = st.integers(0, NUM_PEERS - 1)

Window = tuple[int, int, int]


@dataclass(slots=True)
class Model:
    """What an onlooker knows who sees every grant and every receipt."""

    holder: dict[Window, tuple[int, str, int]] = field(default_factory=dict)
    """Last grant of a window: (incarnation, peer_id, lease_number)."""
    credited: dict[Window, int] = field(default_factory=dict)
    """Outer step that credited a window, in the chain in force."""
    acknowledged: dict[tuple[int, int], int] = field(default_factory=dict)
    """(incarnation, outer_step) -> tokens that a receipt said were credited."""


def windows_of(lease: common_pb2.Lease, begin: int, end: int) -> list[Window]:
    """Single windows of a part of a lease."""
    return [
        (lease.range.data_pass, lease.range.chunk_index, window) for window in range(begin, end)
    ]


class LedgerMachine(RuleBasedStateMachine):
    """One run with three peers and a network that keeps every certificate for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World.create(
            num_peers=NUM_PEERS, budget_windows=24, windows_by_chunk=(7, 5, 6)
        )
        self.model = Model()
        self.pending: list[list[tuple[common_pb2.Signed, int, int]]] = [
            [] for _ in range(NUM_PEERS)
        ]
        self.done: dict[tuple[int, int, int], int] = {}
        """(incarnation, peer, lease_number) -> first window not trained yet."""
        self.sent: list[rounds_pb2.Certificate] = []
        self.requests = 0

    @initialize(peer=PEERS)
    def first_lease(self, peer: int) -> None:
        self.acquire(peer=peer, windows=4, is_repeated=False)

    @rule(peer=PEERS, windows=st.integers(1, 6), is_repeated=st.booleans())
    def acquire(self, peer: int, windows: int, is_repeated: bool) -> None:
        self.requests += 1
        request_id = f"request {self.requests}"
        response = self.world.acquire(peer, wanted_windows=windows, request_id=request_id)
        for signed in response.leases:
            lease = lease_of(signed)
            for window in windows_of(lease, lease.range.begin_window, lease.range.end_window):
                assert window not in self.model.credited, "granted although credited"
                self.model.holder[window] = (lease.incarnation, lease.peer_id, lease.lease_number)
        if is_repeated:
            again = self.world.acquire(peer, wanted_windows=windows, request_id=request_id)
            assert again == response

    @rule(peer=PEERS, windows=st.integers(1, 5))
    def train(self, peer: int, windows: int) -> None:
        """The peer trains on: windows of the leases that it believes to hold."""
        for number, signed in self.world.held[peer].items():
            window_range = lease_of(signed).range
            key = (self.world.incarnation, peer, number)
            begin = self.done.get(key, window_range.begin_window)
            end = min(window_range.end_window, begin + windows)
            if begin < end:
                self.pending[peer].append((signed, begin, end))
                self.done[key] = end
                windows -= end - begin
            if windows <= 0:
                return

    @rule(
        group=st.sets(PEERS, min_size=1),
        trains=st.booleans(),
        is_reported=st.booleans(),
        keeps_pending=st.booleans(),
    )
    def commit(self, group: set[int], trains: bool, is_reported: bool, keeps_pending: bool) -> None:
        """A round of some members; now and then a peer brings the same ranges again later."""
        for peer in sorted(group) if trains else ():
            self.train(peer=peer, windows=2)
        parts = [self.world.contribution(peer, self.pending[peer]) for peer in sorted(group)]
        self.sent.append(self.world.commit(parts))
        if not keeps_pending:
            for peer in group:
                self.pending[peer] = []
        if is_reported:
            self.report_chain()

    @rule(loser=PEERS, heir=PEERS, is_renewed=st.booleans())
    def take_over(self, loser: int, heir: int, is_renewed: bool) -> None:
        """A peer trains and then stalls past its leases; another asks for work."""
        self.acquire(peer=loser, windows=2, is_repeated=False)
        self.train(peer=loser, windows=2)
        self.advance(seconds=61.0, renewing={heir} if is_renewed else set())
        self.acquire(peer=heir, windows=6, is_repeated=False)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def report_any(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.sent) - 1))
        self.take_receipts([self.sent[index]])

    @rule()
    def report_chain(self) -> None:
        self.take_receipts(self.world.swarm_chain)

    def take_receipts(self, certificates: list[rounds_pb2.Certificate]) -> None:
        for certificate, receipt in zip(
            certificates, self.world.report(*certificates), strict=True
        ):
            value = rounds_pb2.RoundValue.FromString(certificate.value)
            key = (value.incarnation, value.outer_step)
            if not receipt.is_stored or "rolled back" in receipt.reason:
                continue
            if key in self.model.acknowledged:
                assert receipt.credited_tokens == self.model.acknowledged[key]
                continue
            credited = self.model_credit(certificate, value)
            assert receipt.credited_tokens == credited * SEQ_LEN, (
                "credited other windows than are due"
            )
            self.model.acknowledged[key] = receipt.credited_tokens

    def model_credit(
        self, certificate: rounds_pb2.Certificate, value: rounds_pb2.RoundValue
    ) -> int:
        """A window counts if its last grant is the lease named, once."""
        credited = 0
        parts = rounds_pb2.Contributions.FromString(certificate.contributions)
        for part in parts.contributions:
            for leased in part.ranges:
                lease = lease_of(leased.lease)
                holder = (value.incarnation, part.peer_id, lease.lease_number)
                for window in windows_of(lease, leased.begin_window, leased.end_window):
                    if self.model.holder[window] == holder and window not in self.model.credited:
                        self.model.credited[window] = value.outer_step
                        credited += 1
        return credited

    @rule(seconds=st.sampled_from([5.0, 40.0, 61.0]), renewing=st.sets(PEERS, max_size=2))
    def advance(self, seconds: float, renewing: set[int]) -> None:
        for peer in renewing:
            for number in self.world.renew(peer):
                self.world.held[peer].pop(number, None)
        self.world.advance(seconds)

    @rule(peer=PEERS, data=st.data())
    def release(self, peer: int, data: st.DataObject) -> None:
        held = sorted(self.world.held[peer])
        if held:
            self.world.release(peer, data.draw(st.lists(st.sampled_from(held), max_size=3)))

    @rule(data=st.data(), loses_work=st.booleans(), chance=st.integers(0, 5))
    def rollback(self, data: st.DataObject, loses_work: bool, chance: int) -> None:
        """Rare, or no history gets long."""
        if chance:
            return
        with self.world.store.read() as tx:
            certified = tx.book(RUN_ID).certified_outer_step
        to_outer_step = data.draw(st.integers(max(0, certified - 3), certified))
        undone = [w for w, step in self.model.credited.items() if step > to_outer_step]
        assert self.world.begin_incarnation(to_outer_step=to_outer_step) == len(undone) * SEQ_LEN
        for window in undone:
            del self.model.credited[window]
        self.model.acknowledged = {
            k: v for k, v in self.model.acknowledged.items() if k[1] <= to_outer_step
        }
        if loses_work:
            self.pending = [[] for _ in range(NUM_PEERS)]
        self.world.held = [{} for _ in range(NUM_PEERS)]

    @rule()
    def restart(self) -> None:
        """The coordinator comes back: what is in memory is gone, what was acknowledged is not."""
        self.world.context.directive_by_number.clear()
        with self.world.store.write() as tx:
            begin_recovery(tx, BeginRecovery(seconds=30), **self.world.clock)

    @invariant()
    def books_balance(self) -> None:
        with self.world.store.read() as tx:
            book = tx.book(RUN_ID)
            totals = tx.peer_totals(RUN_ID)
        open_tokens = book.active_tokens + book.released_tokens + book.expired_tokens
        assert book.granted_tokens == open_tokens + book.credited_tokens
        assert book.granted_tokens <= book.budget_tokens
        assert min(book.active_tokens, book.released_tokens, book.expired_tokens) >= 0
        assert book.credited_tokens == len(self.model.credited) * SEQ_LEN
        assert sum(row.credited_tokens for row in totals) == book.credited_tokens

    def teardown(self) -> None:
        violations = self.world.verify().violations
        self.world.store.close()
        assert violations == ()
