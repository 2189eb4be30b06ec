"""What a peer remembers of its run, and what it refuses to take part in."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from peer.config import PeerConfig
from peer.coordinator_client import ClockOffset
from peer.daemon.membership import (
    Membership,
    check_can_honour,
    describe_capabilities,
    is_same_run,
    join_run,
    load_membership,
    needed_memory_bytes,
    save_membership,
)
from peer.identity import load_identity
from protos.contract.certificate import Tag
from protos.contract.channel import JoinString
from protos.contract.codecs_wire import CODEC_NAMES
from protos.contract.errors import (
    CorruptDataError,
    ErrorCode,
    MachineError,
    UnavailableError,
    UsageError,
)
from protos.contract.ids import PROTOCOL_VERSION
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import TINY_MODEL, DataSpec, OptimizerSpec, RunSpec, StrategySpec
from protos.contract.signing import SigningKey
from protos.muster.v1 import common_pb2, membership_pb2

COORDINATOR = SigningKey(b"\x01" * 32)
SPEC = RunSpec(
    seed=1, budget_tokens=TINY_MODEL.seq_len, model=TINY_MODEL, data=DataSpec(dataset_id="0" * 64)
)
JOIN = JoinString(
    address="127.0.0.1:1",
    ca_fingerprint="0" * 64,
    run_id="demo",
    secret="ab",
    expire_unix_seconds=0,
)


def signed_directive(number: int) -> common_pb2.Signed:
    directive = common_pb2.Directive(run_id="demo", incarnation=1, directive_number=number)
    return COORDINATOR.signed(Tag.DIRECTIVE, directive.SerializeToString())


def signed_record(incarnation: int, *, directive_number: int) -> common_pb2.Signed:
    record = common_pb2.IncarnationRecord(
        run_id="demo", incarnation=incarnation, directive=signed_directive(directive_number)
    )
    return COORDINATOR.signed(Tag.INCARNATION, record.SerializeToString())


@pytest.fixture
def membership() -> Membership:
    response = membership_pb2.JoinResponse(
        peer_id="p",
        run_spec=SPEC.to_wire(),
        coordinator_public_key=COORDINATOR.public_key,
        incarnation_record=signed_record(1, directive_number=2),
        directive=signed_directive(2),
        outer_step=7,
        initial_peers=["/ip4/1.2.3.4/tcp/1"],
    )
    return Membership(join_string=JOIN, response=response, certificate_pem=b"pem")


def test_remembered_over_a_restart(tmp_path: Path, membership: Membership) -> None:
    assert load_membership(tmp_path) is None
    save_membership(tmp_path, membership)
    loaded = load_membership(tmp_path)
    assert loaded == membership
    assert (loaded.spec, loaded.incarnation, loaded.directive_number) == (SPEC, 1, 2)
    plain = json.loads((tmp_path / "membership.json").read_text())
    del plain["protocol_version"]
    (tmp_path / "membership.json").write_text(json.dumps(plain))
    older = load_membership(tmp_path)
    assert older is not None and older.protocol_version != PROTOCOL_VERSION
    assert older.join_string == JOIN, "it may join anew"
    (tmp_path / "membership.json").write_text("{}")
    assert load_membership(tmp_path) is None


def test_the_roster_says_whether_others_can_connect(membership: Membership) -> None:
    assert membership.is_dialled, "nothing is known before the roster names the peer"
    for can_accept in (False, True):
        own = common_pb2.RosterEntry(peer_id="p", can_accept_connections=can_accept)
        other = common_pb2.RosterEntry(peer_id="q", can_accept_connections=not can_accept)
        directive = common_pb2.Directive(run_id="demo", roster=[own, other])
        signed = COORDINATOR.signed(Tag.DIRECTIVE, directive.SerializeToString())
        beat = membership_pb2.HeartbeatResponse(directive=signed)
        assert membership.updated(beat).is_dialled is can_accept


def test_heartbeats_bring_directives_and_incarnations(membership: Membership) -> None:
    beat = membership_pb2.HeartbeatResponse(directive=signed_directive(3), outer_step=9)
    updated = membership.updated(beat)
    assert (updated.directive_number, updated.response.outer_step) == (3, 9)
    assert list(updated.response.initial_peers) == ["/ip4/1.2.3.4/tcp/1"]
    beat = membership_pb2.HeartbeatResponse(incarnation_record=signed_record(2, directive_number=8))
    updated = updated.updated(beat)
    assert (updated.incarnation, updated.directive_number, updated.response.outer_step) == (2, 8, 0)


def test_what_the_coordinator_did_not_sign_is_refused(membership: Membership) -> None:
    forged = signed_directive(3)
    forged.payload = forged.payload + b"\x38\x01"
    with pytest.raises(CorruptDataError) as caught:
        membership.updated(membership_pb2.HeartbeatResponse(directive=forged))
    assert caught.value.code is ErrorCode.SIGNATURE_INVALID


def test_same_run_whatever_the_address(membership: Membership) -> None:
    other = JoinString(
        address="10.0.0.1:9",
        ca_fingerprint=JOIN.ca_fingerprint,
        run_id="demo",
        secret="cd",
        expire_unix_seconds=0,
    )
    assert is_same_run(JOIN, other)


def test_codecs_are_announced_and_a_run_with_an_unknown_one_is_refused(
    tmp_path: Path, membership: Membership
) -> None:
    assert tuple(describe_capabilities(PeerConfig(home=tmp_path)).codecs) == CODEC_NAMES
    membership.response.run_spec = SPEC.to_wire().replace(b'"fp32"', b'"int3"')
    with pytest.raises(UsageError, match="codec 'int3'; known codecs: fp32, .*; choose one"):
        _ = membership.spec


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    shape = ModelShape.from_spec(TINY_MODEL)
    needed_bytes = needed_memory_bytes(shape, "sync")
    fits = PeerConfig(home=tmp_path, memory_limit_bytes=needed_bytes)
    assert check_can_honour(SPEC, fits) == shape
    with pytest.raises(MachineError, match="memory-limit") as caught:
        check_can_honour(SPEC, PeerConfig(home=tmp_path, memory_limit_bytes=needed_bytes - 1))
    assert caught.value.code is ErrorCode.CAPABILITY_MISSING


@pytest.mark.parametrize(
    ("devices", "layout", "words"),
    [
        ("", "tp=2", "takes 2 devices, 1 is lent"),
        ("cpu:2", "tp=2,pp=2", "takes 4 devices, 2 are lent"),
        ("cpu:4", "tp=4", "does not divide 6 query heads"),
        ("cpu:4", "pp=3", "more than 2 layers"),
        ("cpu:2", "tp", "not key=value"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_before_anything_starts(
    devices: str, layout: str, words: str
) -> None:
    with pytest.raises(UsageError) as refusal:
        check_can_honour(SPEC, PeerConfig(devices=devices, layout=layout))
    assert words in refusal.value.found and refusal.value.allowed and refusal.value.remedy
    if "takes" in words:  # its remedy works with any model
        assert "auto" in refusal.value.remedy and "cpu:" not in refusal.value.remedy


def test_layouts_that_the_model_can_have() -> None:
    for layout in ("auto", "tp=2", "pp=2", "dp=4", "fsdp=2", "tp=2,pp=2,checkpointing=on"):
        check_can_honour(SPEC, PeerConfig(devices="cpu:4", layout=layout))


@pytest.mark.parametrize(
    ("optimizer", "config", "words"),
    [
        ("muon", PeerConfig(devices="cpu:2", layout="tp=2"), "muon"),
        ("adamw", PeerConfig(devices="cpu:2", layout="dp=2", execution="native"), "native"),
        ("adamw", PeerConfig(devices="cpu:2", layout="pp=2", probe_interval_seconds=1), "probe_"),
    ],
)
def test_what_needs_one_device_is_refused_with_several(
    optimizer: str, config: PeerConfig, words: str
) -> None:
    strategy = StrategySpec(name="diloco", inner_steps=2, inner_batch_tokens=SPEC.model.seq_len)
    spec = replace(SPEC, strategy=strategy, optimizer=OptimizerSpec(name=optimizer))
    with pytest.raises(UsageError, match=words) as refusal:
        check_can_honour(spec, config)
    assert "layout" in refusal.value.found and "--layout" in refusal.value.remedy
    check_can_honour(spec, replace(config, layout="auto"))


class Coordinator:
    """The calls of a joining peer, written down."""

    certificate_pem = b"pem"

    def __init__(self, peer_id: str) -> None:
        self.calls: list[str] = []
        self.response = membership_pb2.JoinResponse(peer_id=peer_id, run_spec=SPEC.to_wire())

    async def challenge(self) -> tuple[bytes, ClockOffset]:
        self.calls.append("challenge")
        return b"n" * 32, ClockOffset(offset_seconds=0.0, uncertainty_seconds=0.001)

    async def join(self, **_: object) -> membership_pb2.JoinResponse:
        self.calls.append("join")
        return self.response

    async def leave(
        self, request: membership_pb2.LeaveRequest, *, deadline_seconds: float
    ) -> membership_pb2.LeaveResponse:
        self.calls.append(request.reason)
        raise UnavailableError("away")


@pytest.mark.parametrize(
    ("layout", "calls"),
    [
        ("tp=4", ["challenge", "join", "cannot take part: layout tp=4: tp=4 does not divide"]),
        ("pp=3", ["challenge", "join", "cannot take part: layout pp=3: 3 pipeline stages are"]),
        ("dp=5", []),
        ("tp", []),
        ("tp=2", ["challenge", "join"]),
    ],
)
def test_who_cannot_train_the_run_does_not_stay_in_it(
    tmp_path: Path, layout: str, calls: list[str]
) -> None:
    identity = load_identity(tmp_path)
    coordinator = Coordinator(identity.peer_id)
    joining = join_run(
        coordinator,  # type: ignore[arg-type]
        join_string=JOIN,
        identity=identity,
        config=PeerConfig(home=tmp_path, devices="cpu:4", layout=layout),
    )
    if layout == "tp=2":
        asyncio.run(joining)
    else:
        with pytest.raises(UsageError):
            asyncio.run(joining)
    assert [
        call.startswith(begin) for call, begin in zip(coordinator.calls, calls, strict=True)
    ] == [True] * len(calls), coordinator.calls
