"""A small world for ledger tests: one run, a few peers with real keys, real certificates, a store
in memory, virtual time.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from coordinator.operations import leases, ledger_verify, rollback, rounds
from coordinator.operations.common import OperationContext, RunData
from coordinator.operations.requests_ledger import (
    AcquireLeasesRequest,
    AcquireLeasesResponse,
    ApplyRollback,
    CertificateReceipt,
    ExchangeRequest,
    ExchangeResponse,
    ExpireLeasesRequest,
    ReleaseLeasesRequest,
    RenewLeasesRequest,
    ReportCertificatesRequest,
    SubmitVotesRequest,
    SubmitVotesResponse,
    VerifyLedgerRequest,
    VerifyLedgerResponse,
)
from coordinator.store.base import Store
from coordinator.store.rows import DirectiveRow, IncarnationRow, RunRow
from coordinator.store.sqlite import SqliteStore
from protos.contract.certificate import Tag, certificate_from_votes, contributions_digest
from protos.contract.chunk_format import ChunkEntry, Manifest, Source, token_dtype_for
from protos.contract.run_spec import DataSpec, ModelSpec, RunSpec, StrategySpec
from protos.contract.schedule_order import ScheduleOrder
from protos.contract.signing import SigningKey
from protos.contract.telemetry import RunState
from protos.muster.v1 import common_pb2, rounds_pb2

RUN_ID = "run"
SEQ_LEN = 4
START_UNIX_SECONDS = 1_000_000.0
PEER_KEYS = [SigningKey(hashlib.sha256(b"peer %d" % index).digest()) for index in range(8)]
COORDINATOR_KEY = SigningKey(hashlib.sha256(b"coordinator").digest())


def build_manifest(windows_by_chunk: Sequence[int]) -> Manifest:
    """One source whose chunks hold these numbers of windows."""
    chunks = tuple(
        ChunkEntry(
            source_index=0,
            num_tokens=windows * SEQ_LEN + 1,
            digest=hashlib.sha256(b"chunk %d" % index).hexdigest(),
            num_bytes=windows * SEQ_LEN,
        )
        for index, windows in enumerate(windows_by_chunk)
    )
    total_tokens = sum(chunk.num_tokens for chunk in chunks)
    return Manifest(
        vocab_size=256,
        eos_token_id=0,
        token_dtype=token_dtype_for(256),
        tokenizer_digest="0" * 64,
        chunk_bytes=1 << 20,
        seed=0,
        sources=(
            Source(
                name="text",
                origin="test",
                licence="none",
                weight=1.0,
                num_documents=1,
                num_bytes=total_tokens,
                num_tokens=total_tokens,
            ),
        ),
        training_chunks=chunks,
        heldout_chunks=chunks[:1],
    )


@dataclass(slots=True)
class World:
    """One run. `swarm_chain` is what members have committed; the coordinator may know less."""

    store: Store
    context: OperationContext
    keys: list[SigningKey]
    budget_tokens: int
    now_unix_seconds: float = START_UNIX_SECONDS
    incarnation: int = 0
    directive: common_pb2.Directive = field(default_factory=common_pb2.Directive)
    swarm_chain: list[rounds_pb2.Certificate] = field(default_factory=list)
    """Certificates 1..n in force among the members."""
    held: list[dict[int, common_pb2.Signed]] = field(default_factory=list)
    """Per peer: leases that it believes to hold, by number."""

    @classmethod
    def create(
        cls,
        *,
        num_peers: int = 3,
        budget_windows: int = 60,
        windows_by_chunk: Sequence[int] = (7, 5, 9, 6, 8),
        max_data_passes: int = 4,
        round_windows: int = 4,
        store: Store | None = None,
    ) -> "World":
        """A run in incarnation 1 with all peers as voters."""
        manifest = build_manifest(windows_by_chunk)
        spec = RunSpec(
            seed=1,
            budget_tokens=budget_windows * SEQ_LEN,
            model=ModelSpec(
                vocab_size=256,
                d_model=8,
                num_layers=1,
                num_heads=1,
                num_kv_heads=1,
                head_dim=8,
                d_ff=8,
                seq_len=SEQ_LEN,
            ),
            strategy=StrategySpec(global_batch_tokens=num_peers * round_windows * SEQ_LEN),
            data=DataSpec(dataset_id=manifest.dataset_id, max_data_passes=max_data_passes),
        )
        context = OperationContext(signing_key=COORDINATOR_KEY)
        order = ScheduleOrder(spec.seed, manifest, SEQ_LEN)
        context.run_data_by_run[RUN_ID] = RunData(spec=spec, manifest=manifest, order=order)
        world = cls(
            store=store or SqliteStore.in_memory(),
            context=context,
            keys=PEER_KEYS[:num_peers],
            budget_tokens=spec.budget_tokens,
        )
        world.held = [{} for _ in world.keys]
        with world.store.write() as tx:
            tx.insert_run(
                RunRow(
                    run_id=RUN_ID,
                    run_digest=spec.run_digest,
                    spec=spec.to_wire(),
                    dataset_id=manifest.dataset_id,
                    dataset_dir="",
                    dht_prefix="prefix",
                    state=RunState.RUNNING,
                    state_reason="test",
                    min_peers=1,
                    incarnation=0,
                    directive_number=1,
                    create_unix_ms=0,
                    start_unix_ms=0,
                    finish_unix_ms=0,
                )
            )
            leases.open_book(
                tx,
                run_id=RUN_ID,
                seq_len=SEQ_LEN,
                budget_tokens=spec.budget_tokens,
                now_unix_seconds=world.now_unix_seconds,
            )
        world.begin_incarnation(to_outer_step=0, round_windows=round_windows)
        return world

    @property
    def clock(self) -> dict[str, object]:
        """Keyword arguments of every operation."""
        return {"context": self.context, "now_unix_seconds": self.now_unix_seconds}

    def begin_incarnation(self, *, to_outer_step: int, round_windows: int = 4) -> int:
        """Start the next incarnation at the coordinator; members follow at once. Returns tokens
        rolled back.
        """
        incarnation = self.incarnation + 1
        number = incarnation + 1
        directive = common_pb2.Directive(
            run_id=RUN_ID,
            incarnation=incarnation,
            directive_number=number,
            roster=sorted(
                (
                    common_pb2.RosterEntry(
                        peer_id=key.peer_id,
                        public_key=key.public_key,
                        has_vote=True,
                        round_tokens=round_windows * SEQ_LEN,
                        max_round_tokens=4 * round_windows * SEQ_LEN,
                    )
                    for key in self.keys
                ),
                key=lambda entry: entry.peer_id,
            ),
            budget_tokens=self.budget_tokens,
        )
        signed = COORDINATOR_KEY.signed(Tag.DIRECTIVE, directive.SerializeToString())
        record = common_pb2.IncarnationRecord(
            run_id=RUN_ID,
            incarnation=incarnation,
            to_outer_step=to_outer_step,
            base_incarnation=self.incarnation,
            directive=signed,
        )
        signed_record = COORDINATOR_KEY.signed(Tag.INCARNATION, record.SerializeToString())
        with self.store.write() as tx:
            request = ApplyRollback(
                run_id=RUN_ID, incarnation=incarnation, to_outer_step=to_outer_step
            )
            rolled_back_tokens = rollback.apply_rollback(tx, request, **self.clock)
            row = tx.run(RUN_ID)
            tx.update_run(replace(row, incarnation=incarnation, directive_number=number))
            tx.insert_directive(
                DirectiveRow(RUN_ID, number, incarnation, signed.payload, signed.signature, 0)
            )
            tx.insert_incarnation(
                IncarnationRow(
                    RUN_ID,
                    incarnation,
                    to_outer_step,
                    self.incarnation,
                    b"",
                    signed_record.payload,
                    signed_record.signature,
                    0,
                )
            )
        self.incarnation = incarnation
        self.directive = directive
        self.swarm_chain = self.swarm_chain[:to_outer_step]
        return rolled_back_tokens

    def acquire(
        self, peer: int, *, wanted_windows: int = 4, request_id: str = ""
    ) -> AcquireLeasesResponse:
        """Ask for leases and remember them as held."""
        request = AcquireLeasesRequest(
            run_id=RUN_ID,
            peer_id=self.keys[peer].peer_id,
            request_id=request_id,
            incarnation=self.incarnation,
            wanted_tokens=wanted_windows * SEQ_LEN,
        )
        with self.store.write() as tx:
            response = leases.acquire_leases(tx, request, **self.clock)
        for signed in response.leases:
            self.held[peer][lease_of(signed).lease_number] = signed
        return response

    def release(self, peer: int, lease_numbers: Sequence[int]) -> int:
        """Return leases; the peer forgets them."""
        request = ReleaseLeasesRequest(
            run_id=RUN_ID,
            peer_id=self.keys[peer].peer_id,
            incarnation=self.incarnation,
            lease_numbers=tuple(lease_numbers),
            reason="test",
        )
        for number in lease_numbers:
            self.held[peer].pop(number, None)
        with self.store.write() as tx:
            return leases.release_leases(tx, request, **self.clock).num_released_leases

    def renew(self, peer: int) -> tuple[int, ...]:
        """Send a heartbeat with all held leases; returns the lost ones."""
        request = RenewLeasesRequest(
            run_id=RUN_ID,
            peer_id=self.keys[peer].peer_id,
            incarnation=self.incarnation,
            lease_numbers=tuple(self.held[peer]),
        )
        with self.store.write() as tx:
            return leases.renew_leases(tx, request, **self.clock).lost_lease_numbers

    def advance(self, seconds: float) -> int:
        """Let time pass and the ticker run; returns the leases that expired."""
        self.now_unix_seconds += seconds
        with self.store.write() as tx:
            request = ExpireLeasesRequest(run_id=RUN_ID)
            return leases.expire_leases(tx, request, **self.clock).num_expired_leases

    def contribution(
        self,
        peer: int,
        ranges: Sequence[tuple[common_pb2.Signed, int, int]],
        *,
        loss_nats: float = 1.0,
    ) -> rounds_pb2.Contribution:
        """What a peer brings: (signed lease, begin window, end window)."""
        return rounds_pb2.Contribution(
            peer_id=self.keys[peer].peer_id,
            ranges=[
                rounds_pb2.LeasedRange(lease=signed, begin_window=begin, end_window=end)
                for signed, begin, end in ranges
            ],
            loss_nats=loss_nats,
        )

    def value(
        self, contributions: bytes, *, outer_step: int | None = None, content: bytes = b""
    ) -> bytes:
        """Value of the next outer step of the members' chain."""
        step = len(self.swarm_chain) + 1 if outer_step is None else outer_step
        return rounds_pb2.RoundValue(
            run_id=RUN_ID,
            incarnation=self.incarnation,
            outer_step=step,
            roster_directive_number=self.directive.directive_number,
            averaged_digest=hashlib.sha256(b"averaged" + content).digest(),
            contributions_digest=contributions_digest(contributions),
            previous_state_digest=hashlib.sha256(b"state %d" % (step - 1)).digest(),
            next_directive_number=self.directive.directive_number,
        ).SerializeToString()

    def one_range(self, peer: int = 0) -> bytes:
        """Contributions of one new lease of a peer, trained to its end."""
        signed = self.acquire(peer).leases[0]
        return self.contributions([self.contribution(peer, [whole(signed)])])

    def contributions(self, parts: Sequence[rounds_pb2.Contribution]) -> bytes:
        """Serialised, ordered by peer_id."""
        ordered = sorted(parts, key=lambda part: part.peer_id)
        return rounds_pb2.Contributions(contributions=ordered).SerializeToString()

    def votes(
        self, value: bytes, voters: Sequence[int], *, attempt: int = 0
    ) -> list[rounds_pb2.Vote]:
        """Votes of peers by index."""
        return [self.keys[index].vote(value, attempt, self.keys[index].peer_id) for index in voters]

    def commit(
        self, parts: Sequence[rounds_pb2.Contribution], *, attempt: int = 0
    ) -> rounds_pb2.Certificate:
        """All members vote for the next outer step; the coordinator hears nothing yet."""
        contributions = self.contributions(parts)
        value = self.value(contributions)
        votes = self.votes(value, range(len(self.keys)), attempt=attempt)
        certificate = certificate_from_votes(votes, contributions)
        self.swarm_chain.append(certificate)
        return certificate

    def report(self, *certificates: rounds_pb2.Certificate) -> list[CertificateReceipt]:
        """Report certificates."""
        request = ReportCertificatesRequest(run_id=RUN_ID, certificates=certificates)
        with self.store.write() as tx:
            return list(rounds.report_certificates(tx, request, **self.clock).receipts)

    def submit(self, votes: Sequence[rounds_pb2.Vote], contributions: bytes) -> SubmitVotesResponse:
        """Ask for the coordinator's half."""
        request = SubmitVotesRequest(run_id=RUN_ID, votes=tuple(votes), contributions=contributions)
        with self.store.write() as tx:
            return rounds.submit_votes(tx, request, **self.clock)

    def exchange(self, *, outer_step: int, attempt: int, peer_id: str = "") -> ExchangeResponse:
        """Ask for the coordinator's promise."""
        request = ExchangeRequest(
            run_id=RUN_ID,
            peer_id=peer_id or self.keys[0].peer_id,
            incarnation=self.incarnation,
            outer_step=outer_step,
            attempt=attempt,
        )
        with self.store.write() as tx:
            return rounds.exchange(tx, request, **self.clock)

    def verify(self) -> VerifyLedgerResponse:
        """Recompute the books."""
        with self.store.read() as tx:
            return ledger_verify.verify_ledger(tx, VerifyLedgerRequest(run_id=RUN_ID), **self.clock)


def lease_of(signed: common_pb2.Signed) -> common_pb2.Lease:
    """The lease inside."""
    return common_pb2.Lease.FromString(signed.payload)


def whole(signed: common_pb2.Signed) -> tuple[common_pb2.Signed, int, int]:
    """A lease trained to its end."""
    window_range = lease_of(signed).range
    return signed, window_range.begin_window, window_range.end_window
