"""`muster-peer status`: what the peer on this home is doing, from its status file."""

from typing import Any

import typer

from peer.cli.options import AsJson, HomeDir, print_json, print_line

_NOT_DIALLED = (
    "others cannot connect to this peer (found by the coordinator): it reduces nothing; open "
    "--listen-port, or tell the right address with --announce"
)


def status(home: HomeDir = None, is_json: AsJson = False) -> None:
    """Show what the peer on this home is doing."""
    import time

    from peer.config import format_bytes, load_config
    from peer.daemon.reports import read_status
    from peer.home import holder_of_lock
    from protos.contract.text import counted

    path = load_config(flags={"home": home}).home
    pid = holder_of_lock(path)
    found = read_status(path) or {}
    plain = {"is_running": pid is not None, "home": str(path)} | found | {"pid": pid}
    if is_json:
        print_json(plain)
    elif pid is None:
        last = f"; last state {found['state']}: {found['state_reason']}" if found else ""
        print_line(f"no peer runs on {path}{last}")
    elif not found:
        print_line(f"peer {pid} runs on {path} and has not written its status yet")
    else:
        age_seconds = time.time() - found["update_unix_seconds"]
        rows = [
            ("peer", f"{found['name']} ({found['peer_id']}), pid {pid}"),
            ("run", f"{found['run_id']} at {found['address']}"),
            ("state", f"{found['state']}: {found['state_reason']}"),
            ("step", f"{found['outer_step']} of incarnation {found['incarnation']}"),
            ("loss", f"{found['loss_nats']:.4f} nats per token"),
            (
                "speed",
                f"{found['tokens_per_second']:,.0f} tokens/s on {found['device'] or '-'}, "
                f"{counted(found.get('micro_batch_sequences', 0), 'window')} a micro-batch",
            ),
            *([("step plan", found["step_plan"])] if found.get("step_plan") else []),
            (
                "tokens",
                f"{found['trained_tokens']:,} trained, {found['committed_tokens']:,} committed",
            ),
            ("leases", f"{found['held_leases']} with {found['held_tokens']:,} tokens left"),
            *_round_rows(found),
            *([] if found.get("is_dialled", True) else [("reach", _NOT_DIALLED)]),
            ("coordinator", "reachable" if found["is_coordinator_reachable"] else "away"),
            ("memory", format_bytes(found["memory_bytes"])),
            ("clock", f"{found['clock_offset_seconds']:+.3f} s against the coordinator"),
            ("updated", f"{age_seconds:.0f} s ago"),
        ]
        for title, text in rows:
            print_line(f"{title:<12} {text}")
    if pid is None:
        raise typer.Exit(6)


def _round_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows about rounds: the newest committed attempt, attempts, bytes in all and by member."""
    from peer.daemon.timelines import describe_attempt, describe_link
    from peer.swarm.timeline import AttemptTimeline
    from protos.contract.telemetry import AttemptOutcome

    attempts = [AttemptTimeline.from_plain(plain) for plain in found["attempts"]]
    committed = [a for a in attempts if a.outcome is AttemptOutcome.COMMITTED]
    discarded = f"{found['num_attempts_discarded']} discarded"
    if found["discard_reason"]:
        discarded += f", the last: {found['discard_reason']}"
    rows = [
        ("round", describe_attempt(committed[-1]) if committed else "none yet"),
        ("attempts", f"{found['num_rounds_committed']} committed, {discarded}"),
        (
            "traffic",
            f"{found['sent_bytes'] / 1e6:,.1f} MB sent, "
            f"{found['received_bytes'] / 1e6:,.1f} MB received",
        ),
    ]
    for peer_id, (sent, received) in sorted(found["bytes_by_peer"].items()):
        moved = f"{peer_id}: {sent / 1e6:,.1f} MB sent, {received / 1e6:,.1f} received"
        link = found["links"].get(peer_id)
        rows.append(("", moved if link is None else f"{moved}; {describe_link(link)}"))
    return rows
