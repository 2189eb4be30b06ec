"""What a member believes: whose state, which checkpoint, which finite bytes, which run's folder."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peer.checkpoint.store import open_checkpoint
from peer.model.init import initial_vector
from peer.shared_vectors import SharedVectors
from peer.swarm.allreduce import AveragedVector
from peer.swarm.catch_up import CatchUp
from peer.swarm.codecs import EncodedVector
from peer.swarm.record_file import run_folder_name
from peer.swarm.replica import Replica
from peer.swarm.state_transfer import CertifiedStep, _receive_averaged, newest_proven_state
from protos.contract.certificate import Tag, certificate_from_votes, contributions_digest
from protos.contract.codecs_wire import codec_named
from protos.contract.digest import Float32Vector
from protos.contract.errors import CorruptDataError
from protos.contract.ids import COORDINATOR_VOTER
from protos.contract.signing import SigningKey
from protos.muster.v1 import common_pb2, rounds_pb2, state_pb2
from tests.peer.swarm.swarm_hub import NUM_VALUES, RUN_ID, SPEC, Daemon, Hub


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    hub = Hub(tmp_path)
    hub.add_daemon()
    hub.begin()
    return hub


def _replica(hub: Hub, daemon: Daemon) -> Replica:
    replica = hub.replica(daemon)
    replica.enter_incarnation(hub.record)
    replica.build_initial()
    return replica


def test_only_certificates_of_the_named_incarnation_are_acknowledged(hub: Hub) -> None:
    replica = _replica(hub, hub.daemons[0])
    for incarnation, step in ((0, 4), (1, 4), (1, 5)):
        value = rounds_pb2.RoundValue(incarnation=incarnation, outer_step=step)
        replica.unreported.append(rounds_pb2.Certificate(value=value.SerializeToString()))
    replica.acknowledge(incarnation=1, up_to_outer_step=4)
    left = [rounds_pb2.RoundValue.FromString(c.value) for c in replica.unreported]
    assert [(v.incarnation, v.outer_step) for v in left] == [(0, 4), (1, 5)]


def _certified(
    hub: Hub, outer_step: int, *, roster: int = 1, **fields: Any
) -> rounds_pb2.Certificate:
    """A certificate by the coordinator and the voters of its newest directive."""
    contributions = rounds_pb2.Contributions().SerializeToString()
    value = rounds_pb2.RoundValue(
        run_id=RUN_ID,
        incarnation=hub.incarnation,
        outer_step=outer_step,
        roster_directive_number=roster,
        contributions_digest=contributions_digest(contributions),
    )
    for name, content in fields.items():
        setattr(value, name, content)
    data = value.SerializeToString()
    voters = common_pb2.Directive.FromString(hub.directive.payload).roster
    votes = [d.key.vote(data, 1, d.peer_id) for d in hub.daemons if voters]
    return certificate_from_votes([*votes, hub.key.vote(data, 1, COORDINATOR_VOTER)], contributions)


@pytest.mark.parametrize(("incarnation", "is_kept"), [(0, True), (1, False)])
def test_a_state_takes_the_certificate_of_its_step_along(
    hub: Hub, incarnation: int, is_kept: bool
) -> None:
    """Also when the coordinator has it already, and over a restart: others ask for it."""
    replica = _replica(hub, hub.daemons[0])
    assert replica.meta is not None and replica.directive is not None
    certificate = _certified(hub, 3, incarnation=incarnation)
    held = replica.vectors.state_vectors()
    replica.load(replace(replica.meta, outer_step=3), held, replica.directive, [certificate])
    replica.acknowledge(incarnation=incarnation, up_to_outer_step=3)
    path = replica.store.save(replica.checkpoint_header(), held)
    again = _replica(hub, hub.daemons[0])
    assert again.load_checkpoint_file(path) and again.position == (0, 3)
    assert again.certificate_by_step == ({3: certificate} if is_kept else {})


@pytest.mark.parametrize(
    "flaw", ["malformed", "malformed contributions", "unsigned", "another run", "another value"]
)
def test_a_bad_certificate_of_a_donor_is_dropped_and_the_state_taken(hub: Hub, flaw: str) -> None:
    replica = _replica(hub, hub.daemons[0])
    assert replica.meta is not None and replica.directive is not None
    bad = _certified(hub, 3, **({"run_id": "another"} if flaw == "another run" else {}))
    if flaw == "malformed":
        bad.value = b"\xff"
    elif flaw == "malformed contributions":
        bad.contributions = b"\xff"
    elif flaw == "unsigned":
        bad.ClearField("votes")
    elif flaw == "another value":
        bad.value = _certified(hub, 3, averaged_digest=b"another").value
    older = _certified(hub, 2)
    held = replica.vectors.state_vectors()
    replica.load(replace(replica.meta, outer_step=3), held, replica.directive, [bad, older])
    assert replica.position == (0, 3) and replica.certificate_by_step == {}
    assert replica.carried_certificates() == [older]
    header = replace(replica.checkpoint_header(), unreported_certificates=(b"\xff",))
    assert not replica.load_checkpoint_file(
        replica.store.save(header, replica.vectors.state_vectors())
    )


def test_a_certificate_of_an_unknown_roster_goes_along_and_proves_nothing_until_it_is_known(
    hub: Hub,
) -> None:
    """Over a restart as well; the coordinator, which knows the roster, checks it again."""
    replica = _replica(hub, hub.daemons[0])
    assert replica.meta is not None and replica.directive is not None
    hub.issue_directive(hub.daemons)
    good, forged = _certified(hub, 3, roster=2), _certified(hub, 3, roster=2, averaged_digest=b"1")
    forged.ClearField("votes")
    held = replica.vectors.state_vectors()
    replica.load(replace(replica.meta, outer_step=3), held, replica.directive, [good, forged])
    assert replica.unreported == [good, forged]
    replica.acknowledge(incarnation=0, up_to_outer_step=3)
    path = replica.store.save(replica.checkpoint_header(), held)
    again = _replica(hub, hub.daemons[0])
    assert again.load_checkpoint_file(path)
    assert again.certificate_by_step == {} and again.carried_certificates() == [good, forged]
    assert again.learn_directive(hub.directive) is not None
    assert again.certificate_by_step == {3: good}


def test_older_or_equal_checkpoint_does_not_replace_the_state(hub: Hub) -> None:
    replica = _replica(hub, hub.daemons[0])
    assert replica.meta is not None and replica.directive is not None
    old = replica.store.save(replica.checkpoint_header(), replica.vectors.state_vectors())
    _, vectors = open_checkpoint(old)
    ahead = replace(replica.meta, outer_step=2)
    replica.load(ahead, vectors, replica.directive)
    newer = replica.store.save(replica.checkpoint_header(), replica.vectors.state_vectors())
    catch_up = CatchUp(replica, None, own_peer_id=hub.daemons[0].peer_id)  # type: ignore[arg-type]
    for path in (old, newer):
        assert not asyncio.run(catch_up.take_checkpoint(str(path)))
        assert replica.position == (0, 2)
    replica.load(replace(ahead, outer_step=1), vectors, replica.directive)
    assert asyncio.run(catch_up.take_checkpoint(str(newer)))
    assert replica.position == (0, 2)


def test_runs_keep_their_files_apart(hub: Hub) -> None:
    replica = _replica(hub, hub.daemons[0])
    vector = np.zeros(NUM_VALUES, dtype=np.float32)
    replica.hold_averaged(_averaged(vector))
    other_coordinator = run_folder_name(RUN_ID, b"another coordinator")
    assert replica.store.folder.name not in (RUN_ID, other_coordinator)
    assert (hub.daemons[0].home / "averaged" / replica.store.folder.name).is_dir()


def _info(peer: SigningKey, digest: bytes) -> state_pb2.StateInfoResponse:
    content = common_pb2.Attestation(
        run_id="run", incarnation=1, outer_step=5, state_digest=digest, peer_id=peer.peer_id
    )
    signed = peer.signed(Tag.ATTESTATION, content.SerializeToString())
    return state_pb2.StateInfoResponse(attestations=[signed])


def _certified_under(
    directive: common_pb2.Directive, *, has_coordinator: bool = False
) -> CertifiedStep:
    return CertifiedStep(directive=directive, has_coordinator=has_coordinator)


@pytest.mark.parametrize("num_voters", [2, 3])
@pytest.mark.parametrize(
    ("certified_step", "base_outer_step", "has_happened"),
    [(5, 0, True), (0, 5, True), (4, 0, False), (6, 4, False)],
    ids=["certified", "base", "the one before", "another"],
)
def test_own_vote_proves_a_state_only_among_two_and_only_a_step_that_has_happened(
    num_voters: int, certified_step: int, base_outer_step: int, has_happened: bool
) -> None:
    """One attestation of two is no quorum: its signer could make up a step."""
    keys = [SigningKey.generate() for _ in range(num_voters)]
    roster = [
        common_pb2.RosterEntry(peer_id=k.peer_id, public_key=k.public_key, has_vote=True)
        for k in keys
    ]
    directive = common_pb2.Directive(roster=roster)
    proven = newest_proven_state(
        {keys[1].peer_id: _info(keys[1], b"digest")},
        run_id="run",
        incarnation=1,
        directive=directive,
        own_peer_id=keys[0].peer_id,
        base_outer_step=base_outer_step,
        certified_by_step={certified_step: _certified_under(directive)},
    )
    assert (proven is not None) == (has_happened and num_voters == 2)


def test_who_certified_a_step_proves_its_state_to_voters_that_are_behind() -> None:
    """One member went on alone, then two that were behind got votes: they can still come along."""
    keys = [SigningKey.generate() for _ in range(3)]
    roster = [
        common_pb2.RosterEntry(peer_id=k.peer_id, public_key=k.public_key, has_vote=True)
        for k in keys
    ]
    alone = common_pb2.Directive(roster=roster[:1])
    for step, is_proven in ((5, True), (4, False)):
        proven = newest_proven_state(
            {keys[0].peer_id: _info(keys[0], b"digest")},
            run_id="run",
            incarnation=1,
            directive=common_pb2.Directive(roster=roster),
            own_peer_id=keys[1].peer_id,
            base_outer_step=0,
            certified_by_step={step: _certified_under(alone)},
        )
        assert (proven is not None) == is_proven


@pytest.mark.parametrize(
    ("has_coordinator", "digests", "is_proven"),
    [(True, "xx", True), (False, "xx", False), (True, "xxy", False), (True, "x", False)],
    ids=["both", "without the coordinator", "contradicted", "one of four"],
)
def test_half_of_the_voters_prove_a_state_that_the_coordinator_certified_with_them(
    has_coordinator: bool, digests: str, is_proven: bool
) -> None:
    """Two of four are lost at once and come back while the others go on."""
    keys = [SigningKey.generate() for _ in range(4)]
    roster = [
        common_pb2.RosterEntry(peer_id=k.peer_id, public_key=k.public_key, has_vote=True)
        for k in keys
    ]
    directive = common_pb2.Directive(roster=roster)
    infos = {k.peer_id: _info(k, d.encode()) for k, d in zip(keys, digests, strict=False)}
    proven = newest_proven_state(
        infos,
        run_id="run",
        incarnation=1,
        directive=directive,
        own_peer_id=keys[3].peer_id,
        base_outer_step=0,
        certified_by_step={5: _certified_under(directive, has_coordinator=has_coordinator)},
    )
    assert (proven is not None) == is_proven


def test_a_signed_attestation_that_does_not_parse_proves_nothing() -> None:
    key = SigningKey.generate()
    entry = common_pb2.RosterEntry(peer_id=key.peer_id, public_key=key.public_key, has_vote=True)
    info = state_pb2.StateInfoResponse(attestations=[key.signed(Tag.ATTESTATION, b"\xff")])
    proven = newest_proven_state(
        {key.peer_id: info},
        run_id="run",
        incarnation=1,
        directive=common_pb2.Directive(roster=[entry]),
        own_peer_id="own",
        base_outer_step=0,
        certified_by_step={},
    )
    assert proven is None


def test_of_one_answer_only_so_many_signatures_are_checked(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes a tenth of a millisecond in which the member does nothing else."""
    num_checked = [0]

    def count(*_: object) -> bool:
        num_checked[0] += 1
        return False

    replica, junk = _replica(hub, hub.daemons[0]), common_pb2.Signed(payload=b"x")
    for module in ("state_transfer", "contribution_check"):
        monkeypatch.setattr(f"peer.swarm.{module}.has_valid_signature", count)
    info = state_pb2.StateInfoResponse(attestations=[junk] * 5000, directives=[junk] * 5000)

    async def ask(*_: object) -> dict[str, state_pb2.StateInfoResponse]:
        return {"donor": info}

    monkeypatch.setattr("peer.swarm.catch_up.ask_state_info", ask)
    catch_up = CatchUp(replica, None, own_peer_id="own")  # type: ignore[arg-type]
    assert not asyncio.run(catch_up.forward())
    assert 0 < num_checked[0] < 1000


def test_a_directive_that_nobody_signed_does_not_come_with_a_base_either(hub: Hub) -> None:
    """Its numbers go into shared memory, which takes none above 2^64: the process would end."""
    replica = _replica(hub, hub.daemons[0])
    assert replica.meta is not None and replica.directive is not None
    catch_up = CatchUp(replica, None, own_peer_id="own")  # type: ignore[arg-type]
    roster = [common_pb2.RosterEntry(round_tokens=2**64 - 1) for _ in range(2)]
    large = common_pb2.Directive(run_id=RUN_ID, incarnation=1, roster=roster)
    forged = common_pb2.Signed(payload=large.SerializeToString())
    base = replace(replica.meta, incarnation=7)
    assert "is not valid" in catch_up._problem_of_directive(base, forged)
    assert catch_up._problem_of_directive(base, replica.directive) == ""
    assert catch_up._problem_of_directive(replica.meta, replica.directive) == ""


def _averaged(vector: Float32Vector) -> AveragedVector:
    """fp32 bytes as they are, checked by nobody yet."""
    data = memoryview(vector.tobytes())
    return AveragedVector.from_encoded(
        EncodedVector(codec=codec_named("fp32"), num_values=vector.size, data=data)
    )


class _Bytes:
    """A stream that brings one averaged vector."""

    def __init__(self, averaged: AveragedVector) -> None:
        self._data = bytes(averaged.encoded.data)
        self._header = state_pb2.AveragedHeader(
            piece_digests=averaged.piece_digests, total_bytes=len(self._data)
        )

    async def read_message(self, message_type: type) -> state_pb2.AveragedHeader:
        return self._header

    async def read_bytes(self, num_bytes: int) -> bytes:
        part, self._data = self._data[:num_bytes], self._data[num_bytes:]
        return part

    async def acknowledge(self) -> None:
        return None


def test_averaged_bytes_must_be_finite(hub: Hub) -> None:
    vector = np.zeros(NUM_VALUES, dtype=np.float32)
    vector[7] = np.nan
    averaged = _averaged(vector)
    reading = _receive_averaged(
        _Bytes(averaged),  # type: ignore[arg-type]
        averaged.averaged_digest,
        codec_name="fp32",
        num_values=NUM_VALUES,
    )
    with pytest.raises(CorruptDataError, match="1 of 32768 values are not finite"):
        asyncio.run(reading)


def test_step_that_cannot_be_applied_is_said_and_changes_nothing(hub: Hub) -> None:
    replica = _replica(hub, hub.daemons[0])
    vector = np.full(NUM_VALUES, np.inf, dtype=np.float32)
    averaged = _averaged(vector)
    replica.hold_averaged(averaged)
    value = rounds_pb2.RoundValue(
        incarnation=0,
        outer_step=1,
        previous_state_digest=replica.state_digest,
        averaged_digest=averaged.averaged_digest,
        next_directive_number=max(replica.directive_by_number),
    )
    certificate = rounds_pb2.Certificate(value=value.SerializeToString())
    catch_up = CatchUp(replica, None, own_peer_id=hub.daemons[0].peer_id)  # type: ignore[arg-type]
    digest = replica.state_digest
    assert not asyncio.run(catch_up.apply_certificate(certificate, ()))
    assert (
        "outer step 1 cannot be applied: 32768 of 32768 values are not finite" in catch_up.problem
    )
    assert (replica.position, replica.state_digest) == ((0, 0), digest)
    assert np.array_equal(replica.vectors.params, initial_vector(SPEC))
    assert isinstance(replica.vectors, SharedVectors)
    assert replica.vectors.position().outer_step == 0
