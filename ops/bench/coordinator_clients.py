"""Simulated peers for ops/bench/coordinator: real keys, sessions and TLS connections, no training.

Started as a process of its own, so that its CPU time is not the coordinator's. It reads one JSON
command per line and answers each with one JSON line: `join`, `attest`, `wait_begun`, then loads
that every client runs in a closed loop from a common instant on: the next call follows the last
answer.

- lease: AcquireLeases for one round, then ReleaseLeases.
- report: AcquireLeases, then ReportCertificates with a new certificate that credits these leases.
  The client is the only voter of its run, so its own vote is a quorum.
- empty: ReleaseLeases at a server that does nothing (empty_server.py), over as many connections of
  its own.
- heartbeat: a heartbeat with claims and the directive that the client knows.

Making a thousand RSA keys costs minutes, so keys are made from pairs out of few primes: good enough
to be told apart, and only here.
"""

import asyncio
import hashlib
import itertools
import json
import math
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256

from protos.contract.certificate import (
    Tag,
    certificate_from_votes,
    contributions_digest,
    join_payload,
    p2p_join_payload,
)
from protos.contract.channel import (
    JoinString,
    auth_metadata,
    channel_options,
    fetch_pinned_ca,
    split_address,
)
from protos.contract.ids import PROTOCOL_VERSION
from protos.contract.signing import SigningKey
from protos.muster.v1 import common_pb2, leases_pb2, membership_pb2, rounds_pb2

_DEADLINE_SECONDS = 60.0
_METADATA_LIFE_SECONDS = 5.0
_INITIAL_DIGEST = hashlib.sha256(b"initial state").digest()
_CONCURRENT_JOINS = 32
_LATENCY_SAMPLING = 7
"""Every n-th latency is reported."""


def rsa_keys(num_keys: int) -> Iterator[rsa.RSAPrivateKey]:
    """Distinct keys of 2048 bits that share primes."""
    primes: list[int] = []
    while math.comb(len(primes), 2) < num_keys:
        numbers = rsa.generate_private_key(public_exponent=65_537, key_size=2048).private_numbers()
        primes += [numbers.p, numbers.q]
    for p, q in itertools.islice(itertools.combinations(primes, 2), num_keys):
        public = rsa.RSAPublicNumbers(65_537, p * q)
        d = pow(65_537, -1, math.lcm(p - 1, q - 1))
        yield rsa.RSAPrivateNumbers(
            p, q, d, d % (p - 1), d % (q - 1), pow(q, -1, p), public
        ).private_key(unsafe_skip_rsa_key_validation=True)


def p2p_public_key(key: rsa.RSAPrivateKey) -> bytes:
    """libp2p protobuf of the public key."""
    der = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return b"\x08\x00\x12" + bytes([len(der) & 0x7F | 0x80, len(der) >> 7]) + der


class SimulatedPeer:
    """One identity over one connection."""

    def __init__(
        self, channel: grpc.aio.Channel, run_id: str, secret: str, rsa_key: rsa.RSAPrivateKey
    ) -> None:
        self.run_id = run_id
        self.key = SigningKey.generate()
        self.peer_id: str = self.key.peer_id
        self.joined = membership_pb2.JoinResponse()
        self.directive_number = 0
        self.incarnation = 0
        self.outer_step = 0
        self.wanted_tokens = 0
        self.num_calls = 0
        self.latencies_seconds: list[float] = []
        self._secret = secret
        self._rsa_key = rsa_key
        self._channel = channel
        self._call_by_path: dict[str, Any] = {}
        self._metadata_by_path: dict[str, tuple[float, Any]] = {}
        self.empty_channel: grpc.aio.Channel | None = None

    async def call(self, service: str, rpc: str, request: Any, response_class: Any) -> Any:
        """One authenticated call, timed."""
        path = f"/muster.v1.{service}/{rpc}"
        call = self._call_by_path.get(path)
        if call is None:
            call = self._call_by_path[path] = self._channel.unary_unary(
                path, request_serializer=None, response_deserializer=response_class.FromString
            )
        begin_seconds = time.perf_counter()
        response = await call(
            request.SerializeToString(), metadata=self._metadata(path), timeout=_DEADLINE_SECONDS
        )
        self.num_calls += 1
        if self.num_calls % _LATENCY_SAMPLING == 0:
            self.latencies_seconds.append(time.perf_counter() - begin_seconds)
        return response

    def _metadata(self, path: str) -> Any:
        now_unix_seconds = time.time()
        until, metadata = self._metadata_by_path.get(path, (0.0, None))
        if now_unix_seconds > until:
            metadata = auth_metadata(
                self.joined.session_key,
                method=path,
                peer_id=self.peer_id,
                now_unix_seconds=now_unix_seconds,
            )
            self._metadata_by_path[path] = now_unix_seconds + _METADATA_LIFE_SECONDS, metadata
        return metadata

    async def join(self) -> None:
        """Challenge and Join."""
        challenge = await self._channel.unary_unary(
            "/muster.v1.Membership/Challenge",
            response_deserializer=membership_pb2.ChallengeResponse.FromString,
        )(b"", timeout=_DEADLINE_SECONDS, wait_for_ready=True)
        public = p2p_public_key(self._rsa_key)
        payload = join_payload(challenge.nonce, run_id=self.run_id, p2p_public_key=public)
        p2p_payload = p2p_join_payload(challenge.nonce, public_key=self.key.public_key)
        request = membership_pb2.JoinRequest(
            request_id="join",
            run_id=self.run_id,
            token_secret=bytes.fromhex(self._secret),
            nonce=challenge.nonce,
            public_key=self.key.public_key,
            signature=self.key.sign(Tag.JOIN, payload),
            p2p_public_key=public,
            p2p_signature=self._rsa_key.sign(p2p_payload, padding.PKCS1v15(), SHA256()),
            name=f"peer-{self.peer_id[:6]}",
            protocol_version=PROTOCOL_VERSION,
            capabilities=membership_pb2.PeerCapabilities(
                codecs=["fp32"],
                strategies=["sync"],
                objectives=["causal"],
                memory_bytes=2**40,
                can_accept_connections=True,
                addresses=[f"/ip4/127.0.0.1/tcp/{self.num_calls + 40_000}"],
            ),
        )
        self.joined = await self._channel.unary_unary(
            "/muster.v1.Membership/Join",
            request_serializer=membership_pb2.JoinRequest.SerializeToString,
            response_deserializer=membership_pb2.JoinResponse.FromString,
        )(request, timeout=_DEADLINE_SECONDS)

    async def heartbeat(
        self, attestations: list[common_pb2.Signed]
    ) -> membership_pb2.HeartbeatResponse:
        """One heartbeat; the newest directive and incarnation are remembered."""
        request = membership_pb2.HeartbeatRequest(
            request_id="heartbeat",
            claims=membership_pb2.PeerClaims(
                state="TRAINING",
                state_reason=f"incarnation {self.incarnation}",
                outer_step=self.outer_step,
                loss_nats=3.25,
                tokens_per_second=1000.0,
                memory_bytes=2**29,
                trained_tokens=self.outer_step * self.wanted_tokens,
                round_seconds=8.5,
            ),
            attestations=attestations,
            directive_number=self.directive_number,
            incarnation=self.incarnation,
        )
        response: membership_pb2.HeartbeatResponse = await self.call(
            "Membership", "Heartbeat", request, membership_pb2.HeartbeatResponse
        )
        if response.HasField("incarnation_record"):
            record = common_pb2.IncarnationRecord.FromString(response.incarnation_record.payload)
            self.incarnation = record.incarnation
        if response.HasField("directive"):
            directive = common_pb2.Directive.FromString(response.directive.payload)
            self.directive_number = directive.directive_number
            budget_by_peer = {entry.peer_id: entry.round_tokens for entry in directive.roster}
            self.wanted_tokens = budget_by_peer.get(self.peer_id, 0)
        return response

    async def attest(self) -> None:
        """Say that this peer holds the initial state."""
        attestation = common_pb2.Attestation(
            run_id=self.run_id, state_digest=_INITIAL_DIGEST, peer_id=self.peer_id
        )
        signed = self.key.signed(Tag.ATTESTATION, attestation.SerializeToString())
        await self.heartbeat([signed])

    async def acquire(self) -> list[common_pb2.Signed]:
        """Leases for one round. Raises RuntimeError when there are none, with the coordinator's
        reason.
        """
        request = leases_pb2.AcquireLeasesRequest(
            request_id=f"a{self.num_calls}",
            incarnation=self.incarnation,
            wanted_tokens=self.wanted_tokens,
        )
        response = await self.call(
            "Leases", "AcquireLeases", request, leases_pb2.AcquireLeasesResponse
        )
        if not response.leases:
            raise RuntimeError(f"{self.peer_id} got no lease: {response.reason}")
        return list(response.leases)

    async def lease_once(self) -> None:
        """Acquire and release."""
        numbers = [
            common_pb2.Lease.FromString(signed.payload).lease_number
            for signed in await self.acquire()
        ]
        request = leases_pb2.ReleaseLeasesRequest(
            request_id=f"r{self.num_calls}",
            incarnation=self.incarnation,
            lease_numbers=numbers,
            reason="benchmark",
        )
        await self.call("Leases", "ReleaseLeases", request, leases_pb2.ReleaseLeasesResponse)

    async def report_once(self) -> None:
        """Acquire, and report the certificate of a round that trained exactly that."""
        certificate = self._certificate(await self.acquire())
        request = rounds_pb2.ReportCertificatesRequest(
            request_id=f"c{self.num_calls}", certificates=[certificate]
        )
        response = await self.call(
            "Rounds", "ReportCertificates", request, rounds_pb2.ReportCertificatesResponse
        )
        receipt = response.receipts[0]
        if not receipt.is_stored or receipt.uncredited_tokens:
            raise RuntimeError(f"outer step {self.outer_step + 1}: {receipt}")
        self.outer_step += 1

    def _certificate(self, leases: list[common_pb2.Signed]) -> rounds_pb2.Certificate:
        ranges = []
        for signed in leases:
            window_range = common_pb2.Lease.FromString(signed.payload).range
            ranges.append(
                rounds_pb2.LeasedRange(
                    lease=signed,
                    begin_window=window_range.begin_window,
                    end_window=window_range.end_window,
                )
            )
        contribution = rounds_pb2.Contribution(peer_id=self.peer_id, ranges=ranges, loss_nats=3.0)
        contributions = rounds_pb2.Contributions(contributions=[contribution]).SerializeToString()
        value = rounds_pb2.RoundValue(
            run_id=self.run_id,
            incarnation=self.incarnation,
            outer_step=self.outer_step + 1,
            roster_directive_number=self.directive_number,
            averaged_digest=hashlib.sha256(b"averaged %d" % self.outer_step).digest(),
            contributions_digest=contributions_digest(contributions),
            previous_state_digest=hashlib.sha256(b"state %d" % self.outer_step).digest(),
            next_directive_number=self.directive_number,
        ).SerializeToString()
        return certificate_from_votes([self.key.vote(value, 0, self.peer_id)], contributions)

    async def empty_once(self) -> None:
        """A call that costs the other side nothing but the call."""
        if self.empty_channel is not None:
            self._channel, self.empty_channel = self.empty_channel, None
            self._call_by_path.clear()
        request = leases_pb2.ReleaseLeasesRequest(
            request_id=f"r{self.num_calls}", incarnation=1, lease_numbers=[1], reason="benchmark"
        )
        await self.call("Leases", "ReleaseLeases", request, leases_pb2.ReleaseLeasesResponse)

    async def heartbeat_once(self) -> None:
        """One heartbeat."""
        await self.heartbeat([])


_LOADS: dict[str, Callable[[SimulatedPeer], Awaitable[None]]] = {
    "lease": SimulatedPeer.lease_once,
    "report": SimulatedPeer.report_once,
    "heartbeat": SimulatedPeer.heartbeat_once,
    "empty": SimulatedPeer.empty_once,
}


class Crowd:
    """All simulated peers of this process."""

    def __init__(self) -> None:
        self._peers: list[SimulatedPeer] = []

    async def obey(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do one command and return what came of it."""
        match command["do"]:
            case "join":
                return await self._join(command)
            case "attest":
                await self._each(SimulatedPeer.attest)
                return {}
            case "wait_begun":
                return await self._wait_begun()
            case "connect_to_empty":
                return await self._connect_to_empty(command)
            case "load":
                return await self._load(command)
            case other:
                raise ValueError(f"command {other!r}")

    async def _join(self, command: dict[str, Any]) -> dict[str, Any]:
        join_strings = [JoinString.decode(text) for text in command["join_strings"]]
        first = join_strings[0]
        host, port = split_address(first.address)
        cert_pem = fetch_pinned_ca(host, port, first.ca_fingerprint, timeout_seconds=20)
        credentials = grpc.ssl_channel_credentials(root_certificates=cert_pem)
        options = [*channel_options(), ("grpc.use_local_subchannel_pool", 1)]
        keys = rsa_keys(len(join_strings))
        for join_string, key in zip(join_strings, keys, strict=True):
            channel = grpc.aio.secure_channel(join_string.address, credentials, options=options)
            self._peers.append(SimulatedPeer(channel, join_string.run_id, join_string.secret, key))
        await self._each(SimulatedPeer.join)
        return {}

    async def _wait_begun(self) -> dict[str, Any]:
        for peer in self._peers:
            while peer.incarnation == 0 or not peer.wanted_tokens:
                await peer.heartbeat([])
                if peer.incarnation == 0:
                    await asyncio.sleep(0.2)
        return {}

    async def _load(self, command: dict[str, Any]) -> dict[str, Any]:
        once = _LOADS[command["load"]]
        peers = [peer for peer in self._peers if peer.run_id.startswith(command["run_prefix"])]
        begin_unix_seconds = command["begin_unix_seconds"]
        end_unix_seconds = begin_unix_seconds + command["seconds"]
        for peer in peers:
            peer.latencies_seconds.clear()
        calls_before = sum(peer.num_calls for peer in peers)

        async def work(peer: SimulatedPeer) -> None:
            while time.time() < end_unix_seconds:
                await once(peer)

        await asyncio.sleep(max(0.0, begin_unix_seconds - time.time()))
        await asyncio.gather(*(work(peer) for peer in peers))
        return {
            "num_calls": sum(peer.num_calls for peer in peers) - calls_before,
            "end_unix_seconds": time.time(),
            "latencies_seconds": [x for peer in peers for x in peer.latencies_seconds],
            "cpu_seconds": time.process_time(),
        }

    async def _connect_to_empty(self, command: dict[str, Any]) -> dict[str, Any]:
        """For the load "empty", after which these peers cannot speak to the coordinator."""
        certificate = command["cert_pem"].encode()
        credentials = grpc.ssl_channel_credentials(root_certificates=certificate)
        options = [*channel_options(), ("grpc.use_local_subchannel_pool", 1)]
        for peer in self._peers:
            peer.empty_channel = grpc.aio.secure_channel(
                command["address"], credentials, options=options
            )
            await peer.empty_channel.channel_ready()
        return {}

    async def _each(self, do: Callable[[SimulatedPeer], Awaitable[None]]) -> None:
        semaphore = asyncio.Semaphore(_CONCURRENT_JOINS)

        async def one(peer: SimulatedPeer) -> None:
            async with semaphore:
                await do(peer)

        await asyncio.gather(*(one(peer) for peer in self._peers))


async def main() -> None:
    """Obey commands until standard input ends."""
    crowd = Crowd()
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await crowd.obey(json.loads(line))), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
