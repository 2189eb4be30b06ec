"""A store that is older than what its coordinator has signed: what proves it, and what follows.

The coordinator signs in the transaction that stores (acceptor.py), so its signature never exists
without a record of it. One that the store does not know means that a backup was restored which is
older than the signature. Then its promises may be lost as well: it must neither promise nor give
its half in any incarnation up to the newest that it is known to have signed, and a new incarnation
must have a number above that (architecture section 5: the promise is kept across restarts).

Only own signatures count as proof; what a peer merely says never does.
"""

from dataclasses import dataclass

REMEDY = (
    "stop the coordinator and start it on the newest store if that still exists; else stop all "
    "peers, remove HOME/state on each and start them again: the run then goes back to the newest "
    "checkpoint (ops/runbook.md, Restore)"
)
"""What an operator has to do when steps would be lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedBeyond:
    """Newest things that the coordinator has signed and that its store does not hold."""

    incarnation: int
    outer_step: int
    directive_number: int
    detect_unix_seconds: float
    """When the first of them was seen."""
    reason: str
    """What was found, with the numbers."""

    def applies_to(self, incarnation: int) -> bool:
        """True in incarnations whose promises may be lost; a newer one starts with none."""
        return incarnation <= self.incarnation


def merged(known: SignedBeyond | None, found: SignedBeyond) -> SignedBeyond:
    """Both together: the newest numbers, the first time, the reason of the newest step."""
    if known is None:
        return found
    is_newer = (found.incarnation, found.outer_step) > (known.incarnation, known.outer_step)
    return SignedBeyond(
        incarnation=max(known.incarnation, found.incarnation),
        outer_step=found.outer_step if is_newer else known.outer_step,
        directive_number=max(known.directive_number, found.directive_number),
        detect_unix_seconds=known.detect_unix_seconds,
        reason=found.reason if is_newer else known.reason,
    )


def stall_reason(beyond: SignedBeyond, *, certified_outer_step: int, newest_outer_step: int) -> str:
    """Why the run waits for its operator: going on by itself would lose certified steps."""
    return (
        f"{beyond.reason}; the store ends at outer step {certified_outer_step} of the "
        f"{newest_outer_step} that were made; {REMEDY}"
    )
