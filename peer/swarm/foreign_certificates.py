"""Certificates that came along with a state: from its donor, or from a file that anybody may have
written.

What does not parse, or breaks a rule that can be checked here, is dropped. A certificate of a
roster that is not known here may be valid all the same: it is carried on, since the coordinator,
which knows every roster, checks it before it credits anybody; but it proves nothing here. Pure.
"""

import logging
from collections.abc import Iterable, Mapping

from google.protobuf.message import DecodeError

from protos.contract.signing import check_certificate
from protos.muster.v1 import common_pb2, rounds_pb2

logger = logging.getLogger(__name__)


class ForeignCertificates:
    """Checks them, and keeps those of the own step whose roster is not known here yet."""

    def __init__(
        self,
        *,
        run_id: str,
        coordinator_public_key: bytes,
        directive_by_number: Mapping[int, common_pb2.Signed],
    ) -> None:
        """`directive_by_number` has the checked directives of the current incarnation; it is read,
        and grows.
        """
        self._run_id, self._coordinator_public_key = run_id, coordinator_public_key
        self._directive_by_number = directive_by_number
        self.unproven: list[rounds_pb2.Certificate] = []
        """Of the own step, as others say."""

    def _flaw_in(self, certificate: rounds_pb2.Certificate) -> str | None:
        """What is wrong with it; "" if it is proven, None if its roster is not known here."""
        try:
            value = rounds_pb2.RoundValue.FromString(certificate.value)
            rounds_pb2.Contributions.FromString(certificate.contributions)
        except DecodeError as error:
            return f"it does not parse ({error})"
        if value.run_id != self._run_id:
            return f"it names run {value.run_id!r}"
        signed = self._directive_by_number.get(value.roster_directive_number)
        directive = common_pb2.Directive.FromString(signed.payload if signed else b"")
        if signed is None or directive.incarnation != value.incarnation:
            return None
        return check_certificate(
            certificate,
            directive=directive,
            coordinator_public_key=self._coordinator_public_key,
        )

    def usable(
        self, certificates: Iterable[rounds_pb2.Certificate]
    ) -> list[rounds_pb2.Certificate]:
        """Those without a known flaw."""
        found = []
        for certificate in certificates:
            if flaw := self._flaw_in(certificate):
                logger.warning("a certificate that came with a state is dropped: %s", flaw)
            else:
                found.append(certificate)
        return found

    def take_proven(self) -> list[rounds_pb2.Certificate]:
        """Those of the own step that are proven by what is known by now."""
        flaws = [(certificate, self._flaw_in(certificate)) for certificate in self.unproven]
        self.unproven = [certificate for certificate, flaw in flaws if flaw is None]
        return [certificate for certificate, flaw in flaws if flaw == ""]


def place_of(certificate: rounds_pb2.Certificate) -> tuple[int, int]:
    """(incarnation, outer step) that a certificate, whose value parses, completes."""
    value = rounds_pb2.RoundValue.FromString(certificate.value)
    return value.incarnation, value.outer_step
