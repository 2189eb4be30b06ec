"""Join, tokens and sessions: who is admitted, and every refusal with its code."""

from dataclasses import replace
from typing import Any

import pytest

from coordinator.operations import admin, join, membership, tokens
from coordinator.operations.requests import FindSessionRequest
from coordinator.operations.requests_admin import (
    CreateTokenRequest,
    EvictPeerRequest,
    ListTokensRequest,
    RevokeTokenRequest,
    RunRequest,
)
from protos.contract.codecs_wire import CODEC_NAMES
from protos.contract.errors import ErrorCode, MusterError, RefusedError
from protos.muster.v1 import common_pb2
from tests.coordinator.operations.swarm_world import (
    CAPABILITIES,
    RUN_ID,
    SwarmWorld,
    digest_of,
    p2p_public_key_of,
    rsa_key,
)


def refused(world: SwarmWorld, index: int, **changes: Any) -> ErrorCode:
    """Code of the refusal of a Join; nothing may be left of it."""
    before = world.status().num_peers_seen
    with pytest.raises(MusterError) as caught:
        world.do(join.join, world.join_request(index, **changes))
    assert world.status().num_peers_seen == before
    assert caught.value.found and caught.value.allowed
    return caught.value.code


def new_token(world: SwarmWorld, **fields: Any) -> Any:
    return world.do(tokens.create_token, CreateTokenRequest(**fields))


def test_a_new_key_joins_with_a_token_and_comes_back_without() -> None:
    world = SwarmWorld.create()
    first = world.join(0)
    assert first.peer_id == world.id_of(0) and first.is_new_member
    assert first.next_lease_number == 1 and len(first.session_key) == 32
    assert first.session_expire_unix_seconds == world.now + 86_400
    record = common_pb2.IncarnationRecord.FromString(first.incarnation_record.payload)
    assert (record.incarnation, record.to_outer_step) == (0, 0)
    again = world.join(0, token_secret=b"")
    assert not again.is_new_member and again.session_key != first.session_key
    assert world.do(tokens.list_tokens, ListTokensRequest()).tokens[0].num_uses == 1
    assert world.join(1).initial_peers == CAPABILITIES.addresses


def test_tokens_are_refused_each_for_its_reason() -> None:
    world = SwarmWorld.create()
    assert refused(world, 0, token_secret=b"wrong" * 8) is ErrorCode.TOKEN_UNKNOWN
    assert refused(world, 0, token_secret=b"") is ErrorCode.TOKEN_UNKNOWN
    single = new_token(world, max_uses=1)
    world.join(0, token_secret=single.secret)
    assert refused(world, 1, token_secret=single.secret) is ErrorCode.TOKEN_EXHAUSTED
    world.join(0, token_secret=single.secret)
    short = new_token(world, expire_after_seconds=10.0)
    world.now += 11.0
    assert refused(world, 1, token_secret=short.secret) is ErrorCode.TOKEN_EXPIRED
    revoked = new_token(world, expire_after_seconds=0.0)
    assert revoked.expire_unix_seconds == 0
    request = RevokeTokenRequest(token_id=revoked.token_id)
    assert world.do(tokens.revoke_token, request).was_revoked
    assert not world.do(tokens.revoke_token, request).was_revoked
    assert refused(world, 1, token_secret=revoked.secret) is ErrorCode.TOKEN_REVOKED
    listed = world.do(tokens.list_tokens, ListTokensRequest()).tokens
    assert sorted(token.state for token in listed) == ["EXHAUSTED", "EXPIRED", "REVOKED", "VALID"]
    with pytest.raises(MusterError, match="number"):
        new_token(world, max_uses=-1)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"run_id": "other"}, ErrorCode.UNKNOWN_RUN),
        ({"protocol_version": 99}, ErrorCode.PROTOCOL_MISMATCH),
        ({"signature": bytes(64)}, ErrorCode.SIGNATURE_INVALID),
        ({"p2p_signature": bytes(256)}, ErrorCode.SIGNATURE_INVALID),
        ({"p2p_public_key": b"\x08\x00\x12\x03abc"}, ErrorCode.SIGNATURE_INVALID),
        ({"p2p_public_key": b"\x08\x01\x12" + bytes(40)}, ErrorCode.SIGNATURE_INVALID),
        ({"p2p_public_key": b""}, ErrorCode.SIGNATURE_INVALID),
        ({"public_key": b"short"}, ErrorCode.INVALID_ARGUMENT),
        ({"nonce": b"short"}, ErrorCode.INVALID_ARGUMENT),
        ({"nonce": b"m" * 32}, ErrorCode.SIGNATURE_INVALID),
        ({"name": "<script>"}, ErrorCode.INVALID_ARGUMENT),
        ({"capabilities": replace(CAPABILITIES, codecs=())}, ErrorCode.CAPABILITY_MISSING),
        ({"capabilities": replace(CAPABILITIES, strategies=("x",))}, ErrorCode.CAPABILITY_MISSING),
        ({"capabilities": replace(CAPABILITIES, objectives=("x",))}, ErrorCode.CAPABILITY_MISSING),
        ({"capabilities": replace(CAPABILITIES, addresses=("x",))}, ErrorCode.INVALID_ARGUMENT),
        (
            {"capabilities": replace(CAPABILITIES, addresses=("/ip4/host.example/tcp/1",))},
            ErrorCode.INVALID_ARGUMENT,
        ),
    ],
)
def test_bad_requests_are_refused_each_for_its_reason(
    changes: dict[str, Any], code: ErrorCode
) -> None:
    assert refused(SwarmWorld.create(), 0, **changes) is code


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_a_peer_without_the_codec_of_the_run_is_refused_with_what_it_offers(codec: str) -> None:
    world = SwarmWorld.create(codec=codec)
    offered = tuple(name for name in CODEC_NAMES if name != codec)
    request = world.join_request(0, capabilities=replace(CAPABILITIES, codecs=offered))
    with pytest.raises(RefusedError) as caught:
        world.do(join.join, request)
    assert caught.value.code is ErrorCode.CAPABILITY_MISSING
    needed = f"codec {codec!r} is needed, this peer offers {', '.join(sorted(offered))}"
    assert (caught.value.found, caught.value.remedy) == (needed, "upgrade the peer's package")
    capable = replace(CAPABILITIES, codecs=(*offered, codec))
    assert world.do(join.join, world.join_request(0, capabilities=capable)).session_key


def test_identities_are_bound_to_one_another() -> None:
    world = SwarmWorld.create()
    world.join(0)
    assert refused(world, 1, p2p_key=rsa_key(0)) is ErrorCode.IDENTITY_CONFLICT
    assert refused(world, 0, p2p_key=rsa_key(1)) is ErrorCode.IDENTITY_CONFLICT
    assert p2p_public_key_of(rsa_key(0)) != p2p_public_key_of(rsa_key(1))


def test_a_rejoin_returns_leases_of_the_dead_process() -> None:
    world = SwarmWorld.create()
    world.start(1)
    world.acquire(0)
    assert world.num_active_leases(0) > 0
    response = world.join(0)
    assert response.num_released_leases > 0 and world.num_active_leases(0) == 0
    assert response.next_lease_number > 1


def test_the_evicted_stay_out_and_the_run_over_admits_nobody() -> None:
    world = SwarmWorld.create()
    world.join(0)
    evict = EvictPeerRequest(peer_id=world.id_of(0)[:6], reason="poison")
    assert world.do(admin.evict_peer, evict).peer_id == world.id_of(0)
    assert refused(world, 0) is ErrorCode.PEER_EVICTED
    with pytest.raises(MusterError, match="evicted"):
        world.do(membership.find_session, FindSessionRequest(peer_id=world.id_of(0)))
    with pytest.raises(MusterError, match="0 peers"):
        world.do(admin.evict_peer, EvictPeerRequest(peer_id="zz"))
    world.do(admin.stop_run, RunRequest())
    assert refused(world, 1) is ErrorCode.RUN_NOT_ACTIVE


def test_sessions_are_found_until_they_end() -> None:
    world = SwarmWorld.create()
    response = world.join(0)
    find = FindSessionRequest(peer_id=world.id_of(0))
    found = world.do(membership.find_session, find)
    assert (found.run_id, found.session_key) == (RUN_ID, response.session_key)
    world.leave(0)
    with pytest.raises(MusterError, match="no session"):
        world.do(membership.find_session, find)
    world.join(0)
    world.now += 86_401
    with pytest.raises(MusterError, match="no session"):
        world.do(membership.find_session, find)


def test_a_full_run_admits_nobody_new() -> None:
    world = SwarmWorld.create()
    world.context = replace(world.context, policy=replace(world.context.policy, max_peers=1))
    world.join(0)
    assert refused(world, 1) is ErrorCode.RATE_LIMITED
    world.join(0)


def test_a_wrong_initial_state_is_told_why() -> None:
    world = SwarmWorld.create(min_peers=2)
    for index in range(3):
        world.join(index)
    world.beat(2, world.peer(2).attestation(0, 0, b"y" * 32))
    world.attest(0, 1)
    world.tick(1.0)
    assert world.voters() == [0, 1]
    assert world.row(2).state == "JOINED"
    assert digest_of(0, 0) == world.row(0).attested_digest
