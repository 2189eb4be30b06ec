"""Deployment's patience and rhythm: the numbers that decisions about members, directives,
incarnations and duties wait for.

They come from CoordinatorConfig and never change what is trained, only when the coordinator acts.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmPolicy:
    """Immutable; the defaults suit the internet, `up` shortens them for loopback."""

    peer_ttl_seconds: float = 60.0
    """A peer without a heartbeat for this long is LOST."""
    quorum_grace_seconds: float = 60.0
    """Silent voters are waited for this long before a new incarnation leaves them behind; never
    shorter than the TTL.
    """
    start_grace_seconds: float = 60.0
    """A new run waits this long after the first attested peer for its `min_peers`."""
    settle_seconds: float = 15.0
    """A rollback waits this long after a join for the joiner to say which state it holds."""
    session_seconds: float = 86_400.0
    """Life of a session key."""
    directive_interval_seconds: float = 2.0
    """Least time between directives that are not urgent."""
    speed_directive_interval_seconds: float = 10.0
    """Least time between directives that only follow measured speeds."""
    checkpoint_interval_seconds: float = 60.0
    """How often a member is asked to upload the newest state."""
    num_kept_checkpoints: int = 3
    """Newest proved checkpoints that are kept."""
    num_evaluations: int = 8
    """Evaluations over the budget, evenly by credited tokens, the final one included and step 0
    not; in the first two parts there are more (duties.evaluation_part).
    """
    duty_ttl_seconds: float = 120.0
    """A duty whose holder has not said for this long that it works on it goes to somebody else."""
    max_peers: int = 4096
    """Most live members of a run."""
    num_reply_certificates: int = 16
    """Most certificates in one heartbeat reply."""
