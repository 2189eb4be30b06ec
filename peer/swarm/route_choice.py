"""Which way a pair of members moves bulk bytes: TCP, or QUIC where that was measured to be faster.

libp2p keeps one TCP connection per pair, whose throughput the kernel's send buffer bounds to about
buffer / RTT (23 MB/s at 100 ms with Linux's default of 4 MiB). QUIC is not bounded so, but falls to
a crawl under loss that TCP with BBR hardly notices. So both are tried, in the quiet after a round,
and only where it can matter: pairs that have shown about a buffer in flight. Pure.
"""

from dataclasses import dataclass
from enum import StrEnum

PROBE_BYTES = 32 * 2**20
PROBE_SECONDS = 1.5
"""A probe ends at whichever comes first."""
_LEAST_IN_FLIGHT_BYTES = 2**20
_LEAST_RATE_RATIO = 1.25
_ROUNDS_BETWEEN_PROBES = 100


class Route(StrEnum):
    """Ways for bulk bytes; messages always go over TCP."""

    TCP = "TCP"
    QUIC = "QUIC"


@dataclass(slots=True)
class PairRoute:
    """What is known of the way to one member."""

    route: Route = Route.TCP
    reason: str = "not measured yet"
    num_rounds: int = 0
    next_probe_round: int = 0

    def note_round(self, *, rtt_seconds: float, bytes_per_second: float) -> bool:
        """A round has moved bytes at this rate; True if both ways should now be tried."""
        self.num_rounds += 1
        if self.num_rounds < self.next_probe_round:
            return False
        if self.route is Route.TCP and rtt_seconds * bytes_per_second < _LEAST_IN_FLIGHT_BYTES:
            return False
        self.next_probe_round = self.num_rounds + _ROUNDS_BETWEEN_PROBES
        return True

    def note_probe(self, *, tcp_bytes_per_second: float, quic_bytes_per_second: float) -> None:
        """Both ways were tried, one after the other; 0 for one that failed."""
        is_quic = quic_bytes_per_second > _LEAST_RATE_RATIO * tcp_bytes_per_second
        self.route = Route.QUIC if is_quic else Route.TCP
        self.reason = (
            f"measured {tcp_bytes_per_second / 1e6:.1f} MB/s over TCP and "
            f"{quic_bytes_per_second / 1e6:.1f} MB/s over QUIC"
        )

    def note_failure(self, reason: str) -> None:
        """The way failed in use: back to TCP, which every member has."""
        self.route, self.reason = Route.TCP, reason
        self.next_probe_round = self.num_rounds + _ROUNDS_BETWEEN_PROBES
