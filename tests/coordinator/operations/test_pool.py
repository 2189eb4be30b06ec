"""Live peers as a pool: their own measurements, their history, what is not known."""

from dataclasses import replace
from typing import Any

import pytest

from coordinator.operations import membership
from coordinator.operations.pool import PoolFound, live_pool, site_of
from coordinator.operations.requests import Claims, HeartbeatRequest
from coordinator.operations.requests_admin import PoolRequest
from coordinator.scaling.pool import DAY_SECONDS
from protos.contract.errors import ErrorCode, UnavailableError
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import RunSpec
from tests.coordinator.operations.swarm_world import CAPABILITIES, RUN_ID, SwarmWorld


def pool_of(world: SwarmWorld) -> PoolFound:
    with world.store.read() as tx:
        return live_pool(tx, PoolRequest(), context=world.context, now_unix_seconds=world.now)


def beat(world: SwarmWorld, index: int, **claims: Any) -> None:
    request = HeartbeatRequest(
        run_id=RUN_ID,
        peer_id=world.peer(index).peer_id,
        claims=Claims(state="TRAINING", **claims),
        attestations=(),
        lease_numbers=(),
        directive_number=0,
        incarnation=0,
    )
    world.do(membership.heartbeat, request)


def test_measured_speeds_links_and_memory() -> None:
    world = SwarmWorld.create()
    world.join(0, capabilities=replace(CAPABILITIES, memory_bytes=2**33))
    world.join(1, capabilities=replace(CAPABILITIES, memory_bytes=2**34))
    with pytest.raises(UnavailableError, match="measured its training speed") as caught:
        pool_of(world)
    assert caught.value.code is ErrorCode.NOT_READY
    beat(
        world,
        0,
        tokens_per_second=1000.0,
        upload_bytes_per_second=2e6,
        download_bytes_per_second=5e6,
    )
    found = pool_of(world)
    with world.store.read() as tx:
        spec = RunSpec.from_wire(tx.runs()[-1].spec)
    flop = ModelShape.from_spec(spec.model).flop_per_token()
    peer = found.pool.peers[0]
    assert peer.flop_per_second == 1000.0 * flop
    assert (peer.memory_bytes, peer.upload_bytes_per_second) == (2**33, 2e6)
    assert peer.site == "loopback"
    assert [note for note in found.notes if "peer 1 is left out" in note]
    beat(world, 1, tokens_per_second=10.0)
    again = pool_of(world)
    has_links = {peer.name[:6]: peer.has_links for peer in again.pool.peers}
    assert has_links == {"peer 0": True, "peer 1": False}
    assert any("links" in note for note in again.notes)


def test_availability_comes_from_the_event_log() -> None:
    world = SwarmWorld.create()
    world.join(0)
    world.join(1)
    for _ in range(24 * 4):  # peer 1 is silent every other six hours
        world.now += 3600.0
        beat(world, 0, tokens_per_second=1.0)
        if int(world.now / 21_600) % 2:
            beat(world, 1, tokens_per_second=1.0)
        world.tick()
    beat(world, 1, tokens_per_second=1.0)
    found = {peer.name[:6]: peer.availability_ratio for peer in pool_of(world).pool.peers}
    assert found["peer 0"] > 0.95
    assert found["peer 1"] == pytest.approx(0.5, abs=0.1)
    assert pool_of(world).pool.is_drift_measured


def test_sites() -> None:
    assert site_of(["/ip4/127.0.0.1/tcp/1"]) == "loopback"
    assert site_of(["/ip4/192.168.1.4/tcp/1"]) == ""
    assert site_of(["/ip4/192.168.1.4/tcp/1", "/ip4/8.8.8.8/tcp/1"]) == "8.8.8.8/32"
    assert site_of(["/ip6/2001:4860:4860::8888/tcp/1"]) == "2001:4860:4860::/64"
    assert site_of(["/ip4/8.8.8.8/tcp/1/p2p/x/p2p-circuit"]) == "", "the relay's address"
    assert site_of([]) == ""
    assert DAY_SECONDS == 86_400
