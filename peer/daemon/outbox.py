"""What the coordinator has not acknowledged yet: attestations for heartbeats, certificates to
report.

Both are kept in memory until acknowledged. Certificates also lie in the swarm process's local
checkpoint until then, so a killed daemon loses none. Nothing here calls anybody.
"""

from collections import OrderedDict
from collections.abc import Iterable

from protos.muster.v1 import common_pb2, rounds_pb2

MAX_ATTESTATIONS_PER_HEARTBEAT = 256
MAX_CERTIFICATES_PER_REPORT = 16
_MAX_REPORT_BYTES = 2 * 2**20
_MAX_ATTESTATIONS = 4096

CertificateKey = tuple[int, int]
"""(incarnation, outer_step)."""


class Outbox:
    """Attestations and certificates on their way to the coordinator, in order."""

    def __init__(self) -> None:
        self._attestations: OrderedDict[bytes, common_pb2.Signed] = OrderedDict()
        self._certificates: dict[CertificateKey, bytes] = {}
        self.has_lost_state = False
        """The swarm process has ended, and the coordinator does not know it yet."""

    def lose_state(self) -> None:
        """The process that held the state has ended: nothing that it attested can be had any
        more.
        """
        self.has_lost_state = True
        self._attestations.clear()

    def add_attestation(self, signed: bytes) -> None:
        """A state was reached; the same statement is kept once."""
        self._attestations[signed] = common_pb2.Signed.FromString(signed)
        while len(self._attestations) > _MAX_ATTESTATIONS:
            self._attestations.popitem(last=False)

    def attestations(self) -> list[common_pb2.Signed]:
        """The oldest unacknowledged ones."""
        return list(self._attestations.values())[:MAX_ATTESTATIONS_PER_HEARTBEAT]

    def acknowledge_attestations(self, sent: Iterable[common_pb2.Signed]) -> None:
        """A heartbeat or leave that carried them was answered."""
        for signed in sent:
            self._attestations.pop(signed.SerializeToString(), None)

    def add_certificate(self, certificate: bytes) -> None:
        """To be reported."""
        value = rounds_pb2.RoundValue.FromString(
            rounds_pb2.Certificate.FromString(certificate).value
        )
        self._certificates[(value.incarnation, value.outer_step)] = certificate

    @property
    def num_certificates(self) -> int:
        """Not acknowledged yet."""
        return len(self._certificates)

    def oldest_step(self, incarnation: int) -> int | None:
        """Oldest unacknowledged outer step of an incarnation."""
        return min(
            (step for number, step in self._certificates if number == incarnation), default=None
        )

    def next_report(self) -> list[tuple[CertificateKey, rounds_pb2.Certificate]]:
        """The oldest certificates that fit into one call."""
        batch: list[tuple[CertificateKey, rounds_pb2.Certificate]] = []
        num_bytes = 0
        for key in sorted(self._certificates)[:MAX_CERTIFICATES_PER_REPORT]:
            num_bytes += len(self._certificates[key])
            if batch and num_bytes > _MAX_REPORT_BYTES:
                break
            batch.append((key, rounds_pb2.Certificate.FromString(self._certificates[key])))
        return batch

    def settle_certificate(self, key: CertificateKey) -> None:
        """Stored by the coordinator, or of no use any more."""
        self._certificates.pop(key, None)
