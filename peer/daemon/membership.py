"""Joining a run, and remembering it: a restarted peer needs neither its token nor a running
coordinator.

`membership.json` holds what the last Join returned, with the newest incarnation record, directive
and addresses since. With it a peer whose coordinator is away finds the swarm, resynchronises and
votes; its leases died with its old process.
"""

import base64
import contextlib
import json
import os
import sys
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from peer import session_events as ev
from peer.config import EXECUTIONS_OF_RANKS, PeerConfig, format_bytes
from peer.coordinator_client import ClockOffset, CoordinatorClient, check_clock
from peer.home import write_atomically
from peer.identity import Identity
from peer.parallel.layout import Layout, device_names, parse_layout, require_possible
from protos.contract.certificate import Tag
from protos.contract.channel import JoinString
from protos.contract.codecs_wire import CODEC_NAMES
from protos.contract.errors import (
    CorruptDataError,
    ErrorCode,
    MachineError,
    MusterError,
    RefusedError,
    UsageError,
)
from protos.contract.ids import PROTOCOL_VERSION
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import OBJECTIVES, STRATEGIES, RunSpec
from protos.contract.signing import has_valid_signature
from protos.muster.v1 import common_pb2, membership_pb2

_FILE_NAME = "membership.json"
_BASE_MEMORY_BYTES = 600 * 2**20
"""Libraries of the three processes, measured with torch 2.13 CPU: 250 to 350 MiB in the trainer, as
much in the swarm process.
"""
_LEAVE_SECONDS = 2.0
_VECTORS_BY_STRATEGY = {"sync": 8, "diloco": 12}
"""sync: state (3), contribution, the trainer's parameters and gradients, the swarm process's
average and next state. diloco: state (2), contribution, the trainer's local parameters, gradients,
their sum, inner moments (2) and anchors, the swarm process's average, next state and residual.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """A run as this peer knows it."""

    join_string: JoinString
    response: membership_pb2.JoinResponse
    """Last answer to Join, with the newest record, directive, addresses and outer step."""
    certificate_pem: bytes
    """The coordinator's TLS certificate, pinned by the join string."""
    protocol_version: int = PROTOCOL_VERSION
    """Of the peer that joined; others may only read it and join anew."""

    @property
    def spec(self) -> RunSpec:
        """What the run is."""
        return RunSpec.from_wire(self.response.run_spec)

    @property
    def incarnation(self) -> int:
        """Current incarnation."""
        record = common_pb2.IncarnationRecord.FromString(self.response.incarnation_record.payload)
        return int(record.incarnation)

    @property
    def directive_number(self) -> int:
        """Newest directive."""
        directive = common_pb2.Directive.FromString(self.response.directive.payload)
        return int(directive.directive_number)

    @property
    def is_dialled(self) -> bool:
        """False if the newest roster says that others cannot connect to this peer."""
        directive = common_pb2.Directive.FromString(self.response.directive.payload)
        own = [entry for entry in directive.roster if entry.peer_id == self.response.peer_id]
        return all(entry.can_accept_connections for entry in own)

    def updated(self, heartbeat: membership_pb2.HeartbeatResponse) -> "Membership":
        """With what a heartbeat brought. Raises CorruptDataError if the coordinator did not sign
        it.
        """
        response = membership_pb2.JoinResponse()
        response.CopyFrom(self.response)
        if heartbeat.HasField("incarnation_record"):
            self._check(Tag.INCARNATION, heartbeat.incarnation_record)
            response.incarnation_record.CopyFrom(heartbeat.incarnation_record)
            record = common_pb2.IncarnationRecord.FromString(heartbeat.incarnation_record.payload)
            response.directive.CopyFrom(record.directive)
            response.outer_step = record.to_outer_step
        if heartbeat.HasField("directive"):
            self._check(Tag.DIRECTIVE, heartbeat.directive)
            response.directive.CopyFrom(heartbeat.directive)
        if heartbeat.initial_peers:
            del response.initial_peers[:]
            response.initial_peers.extend(heartbeat.initial_peers)
        response.outer_step = max(response.outer_step, heartbeat.outer_step)
        return replace(self, response=response)

    def _check(self, tag: Tag, signed: common_pb2.Signed) -> None:
        key = self.response.coordinator_public_key
        if not has_valid_signature(key, tag, signed.payload, signed.signature):
            raise CorruptDataError(
                f"a {tag.name.lower()} that the coordinator did not sign",
                allowed="records signed with the key that Join named",
                remedy="join again",
                code=ErrorCode.SIGNATURE_INVALID,
            )


def save_membership(home: Path, membership: Membership) -> None:
    """Remember for the next start; the join string is part of it."""
    plain = {
        "protocol_version": membership.protocol_version,
        "join_string": membership.join_string.encode(),
        "certificate_pem": membership.certificate_pem.decode(),
        "join_response": base64.b64encode(membership.response.SerializeToString()).decode(),
    }
    write_atomically(home / _FILE_NAME, json.dumps(plain).encode())


def load_membership(home: Path) -> Membership | None:
    """What the last session remembered; None if there is none, or none that can be read."""
    try:
        plain = json.loads((home / _FILE_NAME).read_bytes())
        data = base64.b64decode(plain["join_response"], validate=True)
        return Membership(
            join_string=JoinString.decode(plain["join_string"]),
            response=membership_pb2.JoinResponse.FromString(data),
            certificate_pem=plain["certificate_pem"].encode(),
            protocol_version=plain.get("protocol_version", 0),
        )
    except (OSError, ValueError, KeyError, TypeError, MusterError):
        return None


def is_same_run(left: JoinString, right: JoinString) -> bool:
    """True if both lead to the same run of the same coordinator; address and token may differ."""
    return (left.run_id, left.ca_fingerprint) == (right.run_id, right.ca_fingerprint)


def package_version() -> str:
    """Version of this package; "source" when it runs from a checkout."""
    try:
        return metadata.version("muster")
    except metadata.PackageNotFoundError:
        return "source"


def installed_version(package: str) -> str:
    """Version of an installed package without importing it; "" if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def physical_memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe_capabilities(
    config: PeerConfig, *, tokens_per_second: float = 0.0
) -> membership_pb2.PeerCapabilities:
    """What this machine claims at Join."""
    return membership_pb2.PeerCapabilities(
        package_version=package_version(),
        torch_version=installed_version("torch"),
        tokens_per_second=tokens_per_second,
        memory_bytes=config.memory_limit_bytes or physical_memory_bytes(),
        can_accept_connections=True,
        addresses=config.announce,
        codecs=CODEC_NAMES,
        strategies=STRATEGIES,
        objectives=OBJECTIVES,
    )


async def join_run(
    client: CoordinatorClient, *, join_string: JoinString, identity: Identity, config: PeerConfig
) -> tuple[Membership, ClockOffset]:
    """Machine check, Challenge, clock check, Join, spec check; who cannot train the run leaves it
    at once, so that nobody waits for it. Raises MusterError.
    """
    check_machine(config)
    nonce, clock = await client.challenge()
    check_clock(clock)
    response = await client.join(
        join_string=join_string,
        nonce=nonce,
        signing_key=identity.signing_key,
        p2p_public_key=identity.p2p_public_key,
        sign_with_p2p_key=identity.sign_with_p2p_key,
        name=config.name,
        capabilities=describe_capabilities(config),
    )
    membership = Membership(
        join_string=join_string, response=response, certificate_pem=client.certificate_pem
    )
    try:
        if response.peer_id != identity.peer_id:
            raise RefusedError(
                f"the coordinator knows this peer as {response.peer_id}, its key says "
                f"{identity.peer_id}",
                allowed="the identity that follows from the key",
                remedy="update both sides to the same version",
                code=ErrorCode.PROTOCOL_MISMATCH,
            )
        check_can_take_part(membership, config)
    except MusterError as error:
        request = membership_pb2.LeaveRequest(reason=f"cannot take part: {error.found}"[:500])
        with contextlib.suppress(MusterError):
            await client.leave(request, deadline_seconds=_LEAVE_SECONDS)
        raise
    return membership, clock


def check_can_take_part(membership: Membership, config: PeerConfig) -> None:
    """Raises RefusedError for a run that this version does not know, UsageError or MachineError for
    one that this machine cannot train as its owner wishes.
    """
    try:
        spec = membership.spec
    except UsageError as error:
        raise RefusedError(
            f"this version ({package_version()}) cannot take part in the run: {error.found}",
            allowed=error.allowed,
            remedy="install the version that the coordinator runs",
            code=ErrorCode.CAPABILITY_MISSING,
        ) from error
    check_can_honour(spec, config)


def check_machine(config: PeerConfig) -> None:
    """Refuse what no run could be joined with, before one is asked for. Raises MachineError for
    packages that are missing, UsageError for a layout that cannot be read or takes more devices
    than are lent.
    """
    missing = [name for name in ("torch", "hivemind") if not installed_version(name)]
    if missing:
        raise MachineError(
            f"{' and '.join(missing)} not installed for {sys.executable}",
            allowed="an installation with the extra `peer`",
            remedy="pip install -c ops/constraints.txt '.[peer]' in Muster's folder",
            code=ErrorCode.DEPENDENCY_MISSING,
        )
    names = device_names(config.devices or config.device)
    parse_layout(config.layout).require_devices(len(names))


def check_can_honour(spec: RunSpec, config: PeerConfig) -> ModelShape:
    """Return the run's shape if this code and machine can train it. Raises UsageError,
    MachineError.

    RunSpec.from_wire has refused strategies, codecs and objectives that this code does not know.
    """
    check_machine(config)
    shape = ModelShape.from_spec(spec.model)
    needed_bytes = needed_memory_bytes(shape, spec.strategy.name)
    limit_bytes = config.memory_limit_bytes
    if limit_bytes is not None and needed_bytes > limit_bytes:
        raise MachineError(
            f"training a model of {shape.num_parameters:,} parameters needs about "
            f"{format_bytes(needed_bytes)}",
            allowed=f"--memory-limit is {format_bytes(limit_bytes)}",
            remedy="raise --memory-limit, or join a run with a smaller model",
            code=ErrorCode.CAPABILITY_MISSING,
        )
    layout = parse_layout(config.layout).layout()
    require_possible(layout, shape)
    if layout.num_ranks > 1:
        _require_ranks_can(spec, config, layout)
    return shape


def _require_ranks_can(spec: RunSpec, config: PeerConfig, layout: Layout) -> None:
    """Raise UsageError for what only one device can do."""
    needs = {
        "optimizer.name = 'muon', which needs whole matrices": spec.optimizer.name == "muon",
        f"execution {config.execution}": config.execution not in EXECUTIONS_OF_RANKS,
        f"probe_interval_seconds = {config.probe_interval_seconds:g}": (
            config.probe_interval_seconds > 0
        ),
    }
    found = [need for need, is_needed in needs.items() if is_needed]
    if found:
        raise UsageError(
            f"layout {layout.text} and {' and '.join(found)}",
            allowed="one device for the optimizer muon, for an execution other than "
            f"{' or '.join(EXECUTIONS_OF_RANKS)}, and for a layer probe",
            remedy="leave --layout out, or what it does not go with",
        )


def needed_memory_bytes(shape: ModelShape, strategy_name: str) -> int:
    """Least memory of all processes together, activations apart."""
    return _BASE_MEMORY_BYTES + _VECTORS_BY_STRATEGY[strategy_name] * shape.vector_bytes


def joined_event(membership: Membership, *, has_lost_leases: bool) -> ev.Joined:
    """What the machine needs to know of a membership."""
    interval = membership.response.heartbeat_interval_duration
    return ev.Joined(
        heartbeat_interval_seconds=interval.seconds + interval.nanos / 1e9,
        incarnation=membership.incarnation,
        has_lost_leases=has_lost_leases,
    )
