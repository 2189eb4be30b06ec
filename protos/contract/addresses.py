"""libp2p multiaddresses of peers, as far as this system uses them: checked before they spread.

Grammar: /ip4/A | /ip6/A | /dns/N | /dns4/N | /dns6/N, then /tcp/PORT[/ws | /wss] or
/udp/PORT[/quic | /quic-v1], then [/p2p/ID] and, behind a relay, [/p2p-circuit[/p2p/ID]]. Form after
https://github.com/multiformats/multiaddr; what is not in the grammar no peer of ours can dial.
"""

import ipaddress
import re

ALLOWED_ADDRESS = (
    "a multiaddress such as /ip4/192.0.2.7/tcp/4001, /dns4/host.example/tcp/4001 or "
    "/ip6/2001:db8::7/udp/4001/quic"
)
_NAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
_PEER_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]{46,59}")
_HOSTS = ("ip4", "ip6", "dns", "dns4", "dns6")
_ENDINGS = {"tcp": ("ws", "wss"), "udp": ("quic", "quic-v1")}


def problem_of_address(text: str) -> str:
    """What is wrong with a multiaddress; "" if it can be dialled as it stands."""
    parts = text.split("/")
    if not text.isascii() or parts[0] or len(parts) < 5:
        return "it is not /HOST-KIND/HOST/tcp or udp/PORT"
    problem = _problem_of_host(parts[1], parts[2]) or _problem_of_port(parts[3], parts[4])
    rest = parts[5:]
    if not problem and rest and rest[0] in _ENDINGS[parts[3]]:
        rest = rest[1:]
    while not problem and rest:
        if rest[0] == "p2p" and len(rest) > 1 and _PEER_ID.fullmatch(rest[1]):
            rest = rest[2:]
            if rest and rest[0] != "p2p-circuit":
                problem = f"{rest[0]!r} does not follow /p2p/ID"
        elif rest[0] == "p2p-circuit" and "p2p-circuit" not in rest[1:]:
            rest = rest[1:]
            if rest and rest[0] != "p2p":
                problem = f"{rest[0]!r} does not follow /p2p-circuit"
        else:
            problem = f"{'/'.join(rest)!r} is neither /p2p/ID nor /p2p-circuit"
    return problem


def _problem_of_host(kind: str, host: str) -> str:
    if kind not in _HOSTS:
        return f"it begins with {kind!r}, not with one of {', '.join(_HOSTS)}"
    if kind.startswith("ip"):
        try:
            known = ipaddress.ip_address(host)
        except ValueError:
            return f"{host!r} is not an {kind} address"
        is_plain = "%" not in host and f"ip{known.version}" == kind
        return "" if is_plain else f"{host!r} is not an {kind} address"
    names = host.split(".")
    is_name = len(host) <= 253 and all(_NAME.fullmatch(name) for name in names)
    return "" if is_name else f"{host!r} is not a host name"


def _problem_of_port(kind: str, port: str) -> str:
    if kind not in _ENDINGS:
        return f"{kind!r} is neither tcp nor udp"
    is_port = re.fullmatch(r"[0-9]{1,5}", port) is not None and 1 <= int(port) <= 65_535
    return "" if is_port else f"{port!r} is not a port from 1 to 65535"
