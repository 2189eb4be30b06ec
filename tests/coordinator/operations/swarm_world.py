"""A small swarm for membership tests: one run made by create_run, peers with real keys, a store in
memory, virtual time.

Peers are scripted: `commit` makes the next outer step with every live synced member, leases and
certificate included. The digest of a state is a hash of (incarnation, outer_step), so equal
histories have equal states.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from coordinator.domain.policy import SwarmPolicy
from coordinator.operations import admin, duties, join, leases, membership, rounds, tick, tokens
from coordinator.operations import status as status_operations
from coordinator.operations.common import OperationContext, RunData
from coordinator.operations.requests import (
    Capabilities,
    Claims,
    EvaluationResult,
    HeartbeatRequest,
    HeartbeatResponse,
    JoinRequest,
    JoinResponse,
    LeaveRequest,
    ReportDutyRequest,
    TickRequest,
)
from coordinator.operations.requests_admin import (
    CreateRunRequest,
    CreateTokenRequest,
    StatusRequest,
    StatusResponse,
)
from coordinator.operations.requests_ledger import (
    AcquireLeasesRequest,
    ReportCertificatesRequest,
    ReportCertificatesResponse,
)
from coordinator.store.sqlite import SqliteStore
from protos.contract.certificate import (
    Tag,
    certificate_from_votes,
    contributions_digest,
    join_payload,
    p2p_join_payload,
)
from protos.contract.ids import PROTOCOL_VERSION
from protos.contract.run_spec import DataSpec, ModelSpec, RunSpec, StrategySpec
from protos.contract.schedule_order import ScheduleOrder
from protos.contract.signing import SigningKey
from protos.contract.telemetry import LeaseState
from protos.muster.v1 import common_pb2, rounds_pb2
from tests.coordinator.operations.ledger_world import SEQ_LEN, build_manifest

RUN_ID = "test-run"
NONCE = b"n" * 32
CAPABILITIES = Capabilities(
    addresses=("/ip4/127.0.0.1/tcp/4001",),
    codecs=("fp32",),
    strategies=("sync",),
    objectives=("causal",),
)
_RSA_KEYS: dict[int, rsa.RSAPrivateKey] = {}


def rsa_key(index: int) -> rsa.RSAPrivateKey:
    """One of a few RSA keys, made once per test process: they are slow."""
    if index not in _RSA_KEYS:
        _RSA_KEYS[index] = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return _RSA_KEYS[index]


def p2p_public_key_of(key: rsa.RSAPrivateKey) -> bytes:
    """libp2p's protobuf of the public key."""
    der = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    length = len(der)
    return b"\x08\x00\x12" + bytes([length & 0x7F | 0x80, length >> 7]) + der


def digest_of(incarnation: int, outer_step: int) -> bytes:
    """Digest of the state that every honest member reaches."""
    return hashlib.sha256(b"state %d %d" % (incarnation, outer_step)).digest()


@dataclass(slots=True)
class Peer:
    """A scripted peer: what it holds and says."""

    index: int
    key: SigningKey
    incarnation: int = 0
    outer_step: int = 0
    directive_number: int = 0
    tokens_per_second: float = 100.0
    reply: HeartbeatResponse | None = None

    @property
    def peer_id(self) -> str:
        return self.key.peer_id

    def attestation(
        self, incarnation: int, outer_step: int, digest: bytes | None = None
    ) -> common_pb2.Signed:
        """Signed statement that it holds a state."""
        message = common_pb2.Attestation(
            run_id=RUN_ID,
            incarnation=incarnation,
            outer_step=outer_step,
            state_digest=digest or digest_of(incarnation, outer_step),
            peer_id=self.peer_id,
        )
        return self.key.signed(Tag.ATTESTATION, message.SerializeToString())


@dataclass(slots=True)
class SwarmWorld:
    """One run, its coordinator and its peers."""

    store: SqliteStore
    context: OperationContext
    now: float = 1_000_000.0
    secret: bytes = b""
    peers: list[Peer] = field(default_factory=list)
    report: ReportCertificatesResponse | None = None
    """What the coordinator answered to the newest certificate."""

    @classmethod
    def create(
        cls,
        *,
        min_peers: int = 1,
        budget_windows: int = 64,
        batch_windows: int = 8,
        policy: SwarmPolicy | None = None,
        codec: str = "fp32",
    ) -> "SwarmWorld":
        """A new run with a token of any number of uses."""
        manifest = build_manifest((16, 16, 16, 16, 16))
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
            strategy=StrategySpec(global_batch_tokens=batch_windows * SEQ_LEN, codec=codec),
            data=DataSpec(dataset_id=manifest.dataset_id),
        )
        counter = iter(range(1, 1_000_000))

        def random_bytes(num_bytes: int) -> bytes:
            return hashlib.sha512(b"random %d" % next(counter)).digest()[:num_bytes]

        context = OperationContext(
            signing_key=SigningKey(hashlib.sha256(b"coordinator").digest()),
            policy=policy or SwarmPolicy(),
            random_bytes=random_bytes,
        )
        order = ScheduleOrder(spec.seed, manifest, SEQ_LEN)
        context.run_data_by_run[RUN_ID] = RunData(spec=spec, manifest=manifest, order=order)
        world = cls(SqliteStore.in_memory(), context)
        world.do(
            admin.create_run,
            CreateRunRequest(
                run_id=RUN_ID,
                spec=spec.to_wire(),
                dataset_dir="datasets/test",
                manifest=manifest.to_bytes(),
                min_peers=min_peers,
            ),
        )
        world.secret = world.do(tokens.create_token, CreateTokenRequest()).secret
        return world

    def do(self, operation: Callable[..., Any], request: object) -> Any:
        """Run an operation as the writer does."""
        with self.store.write() as tx, tx.savepoint():
            return operation(tx, request, context=self.context, now_unix_seconds=self.now)

    def join_request(self, index: int, **changes: Any) -> JoinRequest:
        """A right Join of peer `index`, with some fields replaced before it is signed."""
        key = SigningKey(hashlib.sha256(b"peer %d" % index).digest())
        p2p_key = changes.pop("p2p_key", None) or rsa_key(index)
        p2p_public_key = p2p_public_key_of(p2p_key)
        values: dict[str, Any] = {
            "run_id": RUN_ID,
            "token_secret": self.secret,
            "nonce": NONCE,
            "public_key": key.public_key,
            "p2p_public_key": p2p_public_key,
            "name": f"peer {index}",
            "protocol_version": PROTOCOL_VERSION,
            "capabilities": CAPABILITIES,
        } | changes
        payload = join_payload(NONCE, run_id=RUN_ID, p2p_public_key=p2p_public_key)
        values.setdefault("signature", key.sign(Tag.JOIN, payload))
        p2p_payload = p2p_join_payload(NONCE, public_key=key.public_key)
        p2p_signature = p2p_key.sign(p2p_payload, padding.PKCS1v15(), hashes.SHA256())
        values.setdefault("p2p_signature", p2p_signature)
        return JoinRequest(**values)

    def join(self, index: int, **changes: Any) -> JoinResponse:
        """Join and keep the peer in `peers`."""
        response = self.do(join.join, self.join_request(index, **changes))
        key = SigningKey(hashlib.sha256(b"peer %d" % index).digest())
        self.peers = [peer for peer in self.peers if peer.index != index]
        self.peers.append(Peer(index=index, key=key))
        self.peers.sort(key=lambda peer: peer.index)
        return response

    def peer(self, index: int) -> Peer:
        return next(peer for peer in self.peers if peer.index == index)

    def beat(
        self,
        index: int,
        *attestations: common_pb2.Signed,
        lease_numbers: tuple[int, ...] = (),
        works_on: tuple[str, int] = ("", 0),
        state: str = "TRAINING",
    ) -> HeartbeatResponse:
        """A heartbeat; the peer follows what the answer says. `works_on`: a duty and its fence."""
        peer = self.peer(index)
        request = HeartbeatRequest(
            run_id=RUN_ID,
            peer_id=peer.peer_id,
            claims=Claims(
                state=state,
                outer_step=peer.outer_step,
                tokens_per_second=peer.tokens_per_second,
            ),
            attestations=attestations,
            lease_numbers=lease_numbers,
            directive_number=peer.directive_number,
            incarnation=peer.incarnation,
            duty_id=works_on[0],
            duty_fence=works_on[1],
        )
        peer.reply = self.do(membership.heartbeat, request)
        if peer.reply.directive is not None:
            directive = common_pb2.Directive.FromString(peer.reply.directive.payload)
            peer.directive_number = directive.directive_number
        if peer.reply.incarnation_record is not None:
            record = common_pb2.IncarnationRecord.FromString(peer.reply.incarnation_record.payload)
            peer.incarnation, peer.outer_step = record.incarnation, record.to_outer_step
        return peer.reply

    def attest(self, *indices: int) -> None:
        """Heartbeats in which peers attest the state that they hold."""
        for index in indices or [peer.index for peer in self.peers]:
            peer = self.peer(index)
            self.beat(index, peer.attestation(peer.incarnation, peer.outer_step))

    def tick(self, seconds: float = 0.0) -> tuple[str, ...]:
        """Let time pass, then tick."""
        self.now += seconds
        return self.do(tick.tick, TickRequest()).changes

    def leave(self, index: int) -> None:
        peer = self.peer(index)
        self.do(membership.leave, LeaveRequest(run_id=RUN_ID, peer_id=peer.peer_id, reason="bye"))
        self.peers.remove(peer)

    def start(self, num_peers: int) -> None:
        """Peers join and attest, the run starts, and everybody has noticed."""
        for index in range(num_peers):
            self.join(index)
        self.attest()
        self.tick(61.0 if num_peers < 1 else 1.0)
        self.notice()

    def notice(self) -> None:
        """Everybody hears of the newest incarnation and directive."""
        for peer in self.peers:
            self.beat(peer.index)

    def status(self) -> StatusResponse:
        with self.store.read() as tx:
            return status_operations.status(
                tx, StatusRequest(), context=self.context, now_unix_seconds=self.now
            )

    def row(self, index: int) -> Any:
        key = SigningKey(hashlib.sha256(b"peer %d" % index).digest())
        with self.store.read() as tx:
            return tx.peer(RUN_ID, key.peer_id)

    def directive(self) -> common_pb2.Directive:
        """The newest directive."""
        with self.store.read() as tx:
            row = tx.directive(RUN_ID, tx.run(RUN_ID).directive_number)
        return common_pb2.Directive.FromString(row.payload)

    def voters(self) -> list[int]:
        """Indices of peers with a vote in the newest directive."""
        votes = {entry.peer_id for entry in self.directive().roster if entry.has_vote}
        return [index for index in range(8) if self.id_of(index) in votes]

    @staticmethod
    def id_of(index: int) -> str:
        return SigningKey(hashlib.sha256(b"peer %d" % index).digest()).peer_id

    def acquire(self, index: int, num_windows: int = 4) -> tuple[common_pb2.Signed, ...]:
        peer = self.peer(index)
        request = AcquireLeasesRequest(
            run_id=RUN_ID,
            peer_id=peer.peer_id,
            request_id="",
            incarnation=peer.incarnation,
            wanted_tokens=num_windows * SEQ_LEN,
        )
        return self.do(leases.acquire_leases, request).leases

    def num_active_leases(self, index: int) -> int:
        with self.store.read() as tx:
            return len(
                [
                    row
                    for row in tx.active_leases(RUN_ID, self.id_of(index))
                    if row.state == LeaseState.ACTIVE
                ]
            )

    def commit(
        self,
        indices: Sequence[int] | None = None,
        *,
        num_windows: int = 4,
        next_directive_number: int = 0,
    ) -> int:
        """Make the next outer step with these peers and report it; returns its number. It names the
        newest directive if no other.
        """
        group = [self.peer(i) for i in (indices or [peer.index for peer in self.peers])]
        outer_step = max(peer.outer_step for peer in group) + 1
        incarnation = group[0].incarnation
        contributions = rounds_pb2.Contributions()
        for peer in sorted(group, key=lambda peer: peer.peer_id):
            part = contributions.contributions.add(peer_id=peer.peer_id, loss_nats=2.0)
            for signed in self.acquire(peer.index, num_windows):
                window_range = common_pb2.Lease.FromString(signed.payload).range
                part.ranges.add(
                    lease=signed,
                    begin_window=window_range.begin_window,
                    end_window=window_range.end_window,
                )
        body = contributions.SerializeToString()
        with self.store.read() as tx:
            run = tx.run(RUN_ID)
            head = rounds.chain_head(tx, run)
        value = rounds_pb2.RoundValue(
            run_id=RUN_ID,
            incarnation=incarnation,
            outer_step=outer_step,
            roster_directive_number=head.directive_number,
            averaged_digest=hashlib.sha256(body).digest(),
            contributions_digest=contributions_digest(body),
            previous_state_digest=digest_of(incarnation, outer_step - 1),
            next_directive_number=next_directive_number or self.directive().directive_number,
        ).SerializeToString()
        votes = [peer.key.vote(value, 0, peer.peer_id) for peer in group]
        certificate = certificate_from_votes(votes, body)
        request = ReportCertificatesRequest(run_id=RUN_ID, certificates=(certificate,))
        self.report = self.do(rounds.report_certificates, request)
        receipt = self.report.receipts[0]
        assert receipt.is_stored, receipt.reason
        for peer in group:
            peer.outer_step = outer_step
        return outer_step

    def finish_evaluation(self, index: int, loss_nats: float = 2.0) -> Any:
        """Report the evaluation duty that the last heartbeat brought."""
        peer = self.peer(index)
        assert peer.reply is not None and peer.reply.duty is not None
        evaluation = EvaluationResult(
            incarnation=peer.incarnation,
            outer_step=peer.outer_step,
            state_digest=digest_of(peer.incarnation, peer.outer_step),
            total_nats=loss_nats * 100,
            num_tokens=100,
            num_bytes=300,
            schedule_tokens=0,
        )
        return self.do(
            duties.report_duty,
            ReportDutyRequest(
                run_id=RUN_ID,
                peer_id=peer.peer_id,
                duty_id=peer.reply.duty.duty_id,
                fence=peer.reply.duty.fence,
                evaluation=evaluation,
            ),
        )
