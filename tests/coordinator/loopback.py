"""A real coordinator on loopback and small clients that speak to it over TLS: what a peer's daemon
does, without a swarm.

The dataset is a few hundred random tokens; nothing is trained here, so its contents do not matter,
its digests do.
"""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256

from coordinator.app import Coordinator
from coordinator.config import CoordinatorConfig
from coordinator.operations.admin import create_run
from coordinator.operations.requests_admin import CreateRunRequest, CreateTokenRequest
from coordinator.operations.tokens import create_token
from protos.contract.certificate import Tag, join_payload, p2p_join_payload
from protos.contract.channel import (
    METADATA_PROTOCOL,
    JoinString,
    auth_metadata,
    error_from_rpc,
    fetch_pinned_ca,
    open_aio_channel,
    split_address,
)
from protos.contract.chunk_format import (
    MANIFEST_FILE,
    TOKENIZER_FILE,
    ChunkEntry,
    Manifest,
    Source,
    chunk_from_tokens,
    heldout_chunk_path,
    token_dtype_for,
    training_chunk_path,
)
from protos.contract.ids import PROTOCOL_VERSION
from protos.contract.run_spec import DataSpec, ModelSpec, RunSpec, StrategySpec
from protos.contract.signing import SigningKey
from protos.muster.v1 import (
    common_pb2,
    corpus_pb2_grpc,
    duties_pb2_grpc,
    leases_pb2,
    leases_pb2_grpc,
    membership_pb2,
    membership_pb2_grpc,
    rounds_pb2_grpc,
)

SEQ_LEN = 8
CHUNK_TOKENS = 129
NUM_TRAINING_CHUNKS = 6
RUN_ID = "run-a"
INITIAL_DIGEST = hashlib.sha256(b"initial state").digest()
DEADLINE_SECONDS = 20.0

STUBS: dict[str, Any] = {
    "Membership": membership_pb2_grpc.MembershipStub,
    "Leases": leases_pb2_grpc.LeasesStub,
    "Rounds": rounds_pb2_grpc.RoundsStub,
    "Corpus": corpus_pb2_grpc.CorpusStub,
    "Duties": duties_pb2_grpc.DutiesStub,
}


def write_dataset(dataset_dir: Path) -> Manifest:
    """A complete dataset directory of random tokens."""
    (dataset_dir / "chunks").mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write_chunk(path: str) -> ChunkEntry:
        data = chunk_from_tokens(rng.integers(1, 256, CHUNK_TOKENS), vocab_size=256)
        (dataset_dir / path).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        return ChunkEntry(
            source_index=0, num_tokens=CHUNK_TOKENS, digest=digest, num_bytes=CHUNK_TOKENS
        )

    tokenizer = b'{"model": {}}'
    (dataset_dir / TOKENIZER_FILE).write_bytes(tokenizer)
    manifest = Manifest(
        vocab_size=256,
        eos_token_id=0,
        token_dtype=token_dtype_for(256),
        tokenizer_digest=hashlib.sha256(tokenizer).hexdigest(),
        chunk_bytes=1 << 20,
        seed=0,
        sources=(
            Source(
                name="text",
                origin="test",
                licence="none",
                weight=1.0,
                num_documents=1,
                num_bytes=1000,
                num_tokens=CHUNK_TOKENS * (NUM_TRAINING_CHUNKS + 1),
            ),
        ),
        training_chunks=tuple(
            write_chunk(training_chunk_path(i)) for i in range(NUM_TRAINING_CHUNKS)
        ),
        heldout_chunks=(write_chunk(heldout_chunk_path(0)),),
    )
    (dataset_dir / MANIFEST_FILE).write_bytes(manifest.to_bytes())
    return manifest


def tiny_spec(manifest: Manifest) -> RunSpec:
    """A run over the dataset: 64 windows of 8 tokens."""
    model = ModelSpec(
        vocab_size=256,
        d_model=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        d_ff=8,
        seq_len=SEQ_LEN,
    )
    return RunSpec(
        seed=1,
        budget_tokens=64 * SEQ_LEN,
        model=model,
        strategy=StrategySpec(global_batch_tokens=8 * SEQ_LEN),
        data=DataSpec(dataset_id=manifest.dataset_id),
    )


def test_config(data_dir: Path, **changes: Any) -> CoordinatorConfig:
    """Loopback, any ports, no rendezvous, quick decisions."""
    values: dict[str, Any] = {
        "data_dir": data_dir,
        "host": "127.0.0.1",
        "port": 0,
        "http_port": 0,
        "has_rendezvous": False,
        "heartbeat_interval_seconds": 1.0,
        "lease_ttl_seconds": 30.0,
        "start_grace_seconds": 0.1,
        "stop_deadline_seconds": 0.5,
    }
    return CoordinatorConfig(**(values | changes))


test_config.__test__ = False  # type: ignore[attr-defined]


class Deployment:
    """A started coordinator with one run."""

    def __init__(self, coordinator: Coordinator, manifest: Manifest, data_dir: Path) -> None:
        self.coordinator = coordinator
        self.manifest = manifest
        self.data_dir = data_dir

    async def token(self, *, max_uses: int = 0, expire_after_seconds: float = 3600.0) -> JoinString:
        """A join string of a new token."""
        made = await self.coordinator.perform(
            create_token,
            CreateTokenRequest(
                run_id=RUN_ID, max_uses=max_uses, expire_after_seconds=expire_after_seconds
            ),
        )
        return JoinString(
            address=self.coordinator.local_address,
            ca_fingerprint=self.coordinator.ca_fingerprint,
            run_id=RUN_ID,
            secret=made.secret.hex(),
            expire_unix_seconds=made.expire_unix_seconds,
        )

    @contextlib.asynccontextmanager
    async def client(
        self, index: int = 0, join_string: JoinString | None = None
    ) -> AsyncIterator["Client"]:
        """A client that has joined."""
        async with open_client(join_string or await self.token(), index) as client:
            await client.join()
            yield client


@contextlib.asynccontextmanager
async def deployed(
    tmp_path: Path, *, clock: Callable[[], float] = time.time, **changes: Any
) -> AsyncIterator[Deployment]:
    """Dataset, coordinator and run in `tmp_path`; everything is stopped at the end."""
    data_dir = tmp_path / "data"
    manifest = write_dataset(data_dir / "datasets" / "test")
    coordinator = Coordinator(test_config(data_dir, **changes), clock=clock)
    await coordinator.start()
    try:
        await coordinator.perform(create_run, create_run_request(manifest))
        yield Deployment(coordinator, manifest, data_dir)
    finally:
        await coordinator.stop()


def create_run_request(manifest: Manifest) -> CreateRunRequest:
    """The run of all tests here."""
    return CreateRunRequest(
        run_id=RUN_ID,
        spec=tiny_spec(manifest).to_wire(),
        dataset_dir="datasets/test",
        manifest=manifest.to_bytes(),
        min_peers=1,
    )


@cache
def p2p_key(index: int) -> rsa.RSAPrivateKey:
    """A libp2p key per client; making one costs 0.1 s."""
    return rsa.generate_private_key(public_exponent=65_537, key_size=2048)


def p2p_public_key(key: rsa.RSAPrivateKey) -> bytes:
    """libp2p protobuf of the public key."""
    der = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return b"\x08\x00\x12" + bytes([len(der) & 0x7F | 0x80, len(der) >> 7]) + der


class Client:
    """One identity over one channel."""

    def __init__(self, channel: grpc.aio.Channel, join_string: JoinString, index: int) -> None:
        self.channel = channel
        self.join_string = join_string
        self.key = SigningKey(hashlib.sha256(b"client %d" % index).digest())
        self.peer_id: str = self.key.peer_id
        self.p2p_key = p2p_key(index)
        self.session_key = b""
        self.joined: membership_pb2.JoinResponse | None = None

    def stub(self, service: str) -> Any:
        """Stub of a service."""
        return STUBS[service](self.channel)

    def metadata(self, service: str, rpc: str, /, **changes: Any) -> Any:
        """Metadata of an authenticated call."""
        values: dict[str, Any] = {
            "session_key": self.session_key,
            "method": f"/muster.v1.{service}/{rpc}",
            "peer_id": self.peer_id,
            "now_unix_seconds": time.time(),
        } | changes
        own_version = str(values.pop("protocol_version", PROTOCOL_VERSION))
        metadata = dict(auth_metadata(values.pop("session_key"), **values))
        return tuple((metadata | {METADATA_PROTOCOL: own_version}).items())

    async def call(self, service: str, rpc: str, request: Any, /, **changes: Any) -> Any:
        """One unary call; raises the coordinator's MusterError."""
        metadata = self.metadata(service, rpc, **changes)
        call = getattr(self.stub(service), rpc)
        try:
            return await call(request, metadata=metadata, timeout=DEADLINE_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error

    async def stream(self, service: str, rpc: str, request: Any) -> list[Any]:
        """All messages of a server stream; raises the coordinator's MusterError."""
        metadata = self.metadata(service, rpc)
        call = getattr(self.stub(service), rpc)
        try:
            return [
                part async for part in call(request, metadata=metadata, timeout=DEADLINE_SECONDS)
            ]
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error

    async def join(self, **changes: Any) -> membership_pb2.JoinResponse:
        """Challenge and Join; the session is kept."""
        stub = self.stub("Membership")
        try:
            challenge = await stub.Challenge(membership_pb2.ChallengeRequest())
            request = self.join_request(challenge.nonce, **changes)
            self.joined = await stub.Join(request, timeout=DEADLINE_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        assert self.joined is not None
        self.session_key = self.joined.session_key
        return self.joined

    def join_request(self, nonce: bytes, /, **changes: Any) -> membership_pb2.JoinRequest:
        """A proper JoinRequest with some fields changed."""
        public = p2p_public_key(self.p2p_key)
        run_id = self.join_string.run_id
        payload = join_payload(nonce, run_id=run_id, p2p_public_key=public)
        p2p_payload = p2p_join_payload(nonce, public_key=self.key.public_key)
        values: dict[str, Any] = {
            "request_id": "join",
            "run_id": run_id,
            "token_secret": bytes.fromhex(self.join_string.secret),
            "nonce": nonce,
            "public_key": self.key.public_key,
            "signature": self.key.sign(Tag.JOIN, payload),
            "p2p_public_key": public,
            "p2p_signature": self.p2p_key.sign(p2p_payload, padding.PKCS1v15(), SHA256()),
            "name": "client",
            "protocol_version": PROTOCOL_VERSION,
            "capabilities": membership_pb2.PeerCapabilities(
                codecs=["fp32"],
                strategies=["sync"],
                objectives=["causal"],
                memory_bytes=2**40,
                can_accept_connections=True,
            ),
        }
        return membership_pb2.JoinRequest(**(values | changes))

    def attestation(
        self, *, incarnation: int = 0, outer_step: int = 0, state_digest: bytes = INITIAL_DIGEST
    ) -> common_pb2.Signed:
        """A signed statement that this client holds a state."""
        attestation = common_pb2.Attestation(
            run_id=self.join_string.run_id,
            incarnation=incarnation,
            outer_step=outer_step,
            state_digest=state_digest,
            peer_id=self.peer_id,
        )
        return self.key.signed(Tag.ATTESTATION, attestation.SerializeToString())

    async def heartbeat(self, **fields: Any) -> membership_pb2.HeartbeatResponse:
        """One heartbeat."""
        request = membership_pb2.HeartbeatRequest(request_id="heartbeat", **fields)
        response: membership_pb2.HeartbeatResponse = await self.call(
            "Membership", "Heartbeat", request
        )
        return response

    async def reach_incarnation_one(self) -> common_pb2.IncarnationRecord:
        """Attest the initial state and ask until the run has begun."""

        async def has_begun() -> common_pb2.IncarnationRecord | None:
            reply = await self.heartbeat(attestations=[self.attestation()])
            record = common_pb2.IncarnationRecord.FromString(reply.incarnation_record.payload)
            return (
                record if reply.HasField("incarnation_record") and record.incarnation == 1 else None
            )

        found = await eventually(has_begun)
        assert isinstance(found, common_pb2.IncarnationRecord)
        return found

    async def acquire(
        self, wanted_tokens: int, request_id: str = "acquire"
    ) -> list[common_pb2.Lease]:
        """Leases of incarnation 1."""
        request = leases_pb2.AcquireLeasesRequest(
            request_id=request_id, incarnation=1, wanted_tokens=wanted_tokens
        )
        response = await self.call("Leases", "AcquireLeases", request)
        return [common_pb2.Lease.FromString(signed.payload) for signed in response.leases]


@contextlib.asynccontextmanager
async def open_client(join_string: JoinString, index: int = 0) -> AsyncIterator[Client]:
    """A client with the coordinator's certificate pinned, not joined yet."""
    host, port = split_address(join_string.address)
    cert_pem = await asyncio.to_thread(
        fetch_pinned_ca, host, port, join_string.ca_fingerprint, timeout_seconds=DEADLINE_SECONDS
    )
    async with open_aio_channel(join_string.address, cert_pem) as channel:
        yield Client(channel, join_string, index)


async def eventually(
    probe: Callable[[], Any], *, deadline_seconds: float = DEADLINE_SECONDS
) -> Any:
    """What an async probe returns once it is true; asks ten times a second until the deadline."""
    async with asyncio.timeout(deadline_seconds):
        while True:
            found = await probe()
            if found:
                return found
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.Event().wait(), 0.1)
