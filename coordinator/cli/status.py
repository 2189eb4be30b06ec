"""`status` and `peers`: the same figures as the page."""

from typing import TYPE_CHECKING

import typer

from coordinator.cli.options import (
    DEFAULT_DATA_DIR,
    AsJson,
    DataDir,
    RunId,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from coordinator.operations.requests_admin import PeerStatus, StatusResponse


def status(
    run_id: RunId = "", data_dir: DataDir = DEFAULT_DATA_DIR, is_json: AsJson = False
) -> None:
    """A run's state with its reason, progress and books."""
    import dataclasses

    from coordinator.cli.perform import look
    from coordinator.identity import is_served
    from coordinator.operations.plain import plain_from_response
    from coordinator.operations.requests_admin import StatusRequest
    from coordinator.operations.status import status as read_status
    from protos.contract.telemetry import CoordinatorState

    found = look(data_dir, read_status, StatusRequest(run_id=run_id))
    if not is_served(data_dir):
        found = dataclasses.replace(
            found,
            coordinator_state=CoordinatorState.STOPPED,
            coordinator_state_reason="no coordinator serves this data directory; "
            "what stands here is how it was left",
        )
    if is_json:
        print_json(plain_from_response(found))
        return
    share = found.credited_tokens / found.budget_tokens if found.budget_tokens else 0.0
    last = found.last_evaluation
    heldout = (
        f"{last.loss_nats:.4f} nats, {last.bits_per_byte:.4f} bits/byte at step {last.outer_step}"
        if last
        else "-"
    )
    for name, text in (
        ("run", f"{found.run_id} ({found.run_digest[:16]})"),
        ("state", f"{found.state}: {found.state_reason}"),
        ("coordinator", f"{found.coordinator_state}: {found.coordinator_state_reason}"),
        ("credited", f"{found.credited_tokens:,} of {found.budget_tokens:,} tokens ({share:.1%})"),
        ("leased", f"{found.active_tokens:,} tokens, {found.expired_tokens:,} expired"),
        (
            "uncredited",
            f"{found.uncredited_trained_tokens:,} tokens; {found.rolled_back_tokens:,} rolled back",
        ),
        ("goodput", f"{found.goodput_tokens_per_second:,.0f} tokens/s"),
        (
            "outer step",
            f"{found.outer_step} (incarnation {found.incarnation}, "
            f"{found.num_rollbacks} rollbacks)",
        ),
        ("training loss", f"{found.train_loss_nats:.4f} nats" if found.train_loss_nats else "-"),
        ("held-out", heldout),
        *_forecast_lines(found),
        (
            "peers",
            f"{found.num_live_peers} live, {found.num_voters} with a vote, "
            f"{found.num_peers_seen} seen",
        ),
        *((("warning", found.reach_warning),) if found.reach_warning else ()),
        ("states equal", "yes" if found.state_digests_equal else "NO"),
        ("checkpoint", found.newest_checkpoint_path or "-"),
    ):
        typer.echo(f"{name:14}  {text}")


def _forecast_lines(found: "StatusResponse") -> list[tuple[str, str]]:
    said = found.forecast.forecast
    if said is None:
        return [("forecast", f"- ({found.forecast.reason})")]
    eta = f"{said.eta_seconds:,.0f} s" if said.eta_seconds >= 0 else "unknown: nobody trains"
    return [
        (
            "forecast",
            f"{said.loss_nats:.4f} nats held-out at {said.final_tokens:,.0f} tokens, "
            f"{said.low_nats:.4f} to {said.high_nats:.4f}; made at "
            f"{found.forecast.credited_tokens:,} tokens",
        ),
        ("", said.reason),
        (
            "best size",
            f"{said.n_opt:.3g} parameters; the present ones use {said.efficiency_ratio:.0%} "
            f"of the compute (by {said.law})",
        ),
        ("advice", said.restart_reason),
        ("cooldown", said.cooldown_reason),
        ("to go", eta),
    ]


def _why(peer: "PeerStatus") -> str:
    """Why a member is in its state, and why it does not reduce."""
    is_told = peer.is_live and peer.claims.state
    reason = peer.claims.state_reason if is_told else peer.state_reason
    problem = peer.capabilities.reach_problem if peer.is_live else ""
    return f"{reason}; cannot be dialled ({problem}), so reduces nothing" if problem else reason


def peers(
    run_id: RunId = "", data_dir: DataDir = DEFAULT_DATA_DIR, is_json: AsJson = False
) -> None:
    """Members of a run with their states and reasons; what peers claim is marked."""
    from coordinator.cli.perform import look
    from coordinator.operations.plain import plain_from_response
    from coordinator.operations.requests_admin import PeersRequest
    from coordinator.operations.status import peers as read_peers

    found = look(data_dir, read_peers, PeersRequest(run_id=run_id))
    if is_json:
        print_json(plain_from_response(found))
        return
    titles = ["peer", "name", "member", "claims", "step", "claimed tokens/s"]
    titles += ["round s", "MB/s", "discarded", "credited", "why"]
    rows = [
        [
            peer.peer_id[:12],
            peer.name,
            peer.state,
            peer.claims.state or "-",
            str(peer.claims.outer_step),
            f"{peer.claims.tokens_per_second:,.0f}",
            f"{peer.claims.round_seconds:.2f}",
            f"{peer.claims.averaging_bytes_per_second / 1e6:.1f}",
            str(peer.claims.num_attempts_discarded),
            f"{peer.credited_tokens:,}",
            _why(peer),
        ]
        for peer in found.peers
    ]
    print_table(titles, rows)
