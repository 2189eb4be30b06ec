"""Only addresses that a peer can dial pass."""

import pytest

from protos.contract.addresses import problem_of_address

PEER = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


GOOD = (
    "/ip4/127.0.0.1/tcp/4001",
    f"/ip4/192.0.2.7/tcp/1/p2p/{PEER}",
    "/ip6/2001:db8::7/udp/65535/quic",
    f"/ip6/::1/udp/4001/quic-v1/p2p/{PEER}",
    "/dns/host/tcp/443/wss",
    "/dns4/my-host.example/tcp/4001",
    "/dns6/my-host.example/tcp/4001",
    f"/ip4/192.0.2.7/tcp/1/p2p/{PEER}/p2p-circuit",
    f"/ip4/192.0.2.7/tcp/1/p2p/{PEER}/p2p-circuit/p2p/{PEER}",
)


@pytest.mark.parametrize("address", GOOD)
def test_what_can_be_dialled_passes(address: str) -> None:
    assert problem_of_address(address) == ""


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("", "not /HOST-KIND"),
        ("/", "not /HOST-KIND"),
        ("x/ip4/127.0.0.1/tcp/1", "not /HOST-KIND"),
        ("/ip4/127.0.0.1", "not /HOST-KIND"),
        ("/ip4/my-host.example/tcp/4001", "'my-host.example' is not an ip4"),
        ("/ip4/::1/tcp/4001", "not an ip4"),
        ("/ip6/127.0.0.1/tcp/4001", "not an ip6"),
        ("/ip6/fe80::1%eth0/tcp/4001", "not an ip6"),
        ("/ip4/127.0.0.1/tcp/0", "not a port"),
        ("/ip4/127.0.0.1/tcp/65536", "not a port"),
        ("/ip4/127.0.0.1/tcp/ 1", "not a port"),
        ("/ip4/127.0.0.1/sctp/1", "neither tcp nor udp"),
        ("/ip4/127.0.0.1/tcp/1/quic", "neither /p2p/ID"),
        ("/ip4/127.0.0.1/tcp/1/", "neither /p2p/ID"),
        ("/ip4/127.0.0.1/tcp/1/p2p", "neither /p2p/ID"),
        ("/ip4/127.0.0.1/tcp/1/p2p/0OIl", "neither /p2p/ID"),
        (f"/ip4/1.2.3.4/tcp/1/p2p/{PEER}/tcp/1", "does not follow /p2p/ID"),
        (f"/ip4/1.2.3.4/tcp/1/p2p/{PEER}/p2p-circuit/p2p-circuit", "neither /p2p/ID"),
        ("/dns4/host..example/tcp/1", "not a host name"),
        ("/dns4/-host/tcp/1", "not a host name"),
        ("/dns4/host.example./tcp/1", "not a host name"),
        ("/unix/tmp/tcp/1", "begins with 'unix'"),
    ],
)
def test_anything_else_is_named(address: str, problem: str) -> None:
    assert problem in problem_of_address(address)
