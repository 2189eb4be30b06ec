"""What `up` leaves behind: summary.json, typed and complete, and the table that people read."""

import json
import math
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from protos.contract.text import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Keys of summary.json; bits per byte are of the held-out text, lower is better."""

    run_digest: str
    num_peers_seen: int
    outer_steps_committed: int
    credited_tokens: int
    budget_tokens: int
    uncredited_trained_tokens: int
    rolled_back_tokens: int
    heldout_loss_nats_first: float
    """Before the first step, on the evaluation's part of the held-out text."""
    heldout_loss_nats_last: float
    """Of the final state, on all of it."""
    heldout_bits_per_byte_last: float
    one_process_bits_per_byte: float
    """One process trained on as many tokens, in the same order and with the same update."""
    gzip_bits_per_byte: float
    bigram_bits_per_byte: float
    train_seconds: float
    goodput_tokens_per_second: float
    credited_tokens_by_peer: dict[str, int]
    state_digests_equal: bool
    ledger_violations: list[str]
    checkpoint_path: str
    """Folder in Hugging Face form, or the state file where there is none."""
    sample_text: str
    not_exported_reason: str
    """Why there is neither an exported folder nor a sample; empty if there are."""

    def to_json(self) -> str:
        """One line of JSON; a number that is not known is null."""
        plain = asdict(self)
        for key, value in plain.items():
            if isinstance(value, float) and not math.isfinite(value):
                plain[key] = None
        return json.dumps(plain)


def summary_table(summary: Summary) -> str:
    """Held-out bits per byte beside the baselines, and the books."""
    table = Table(title="held-out bits per byte (lower is better)", title_justify="left")
    table.add_column("what")
    table.add_column("bits/byte", justify="right")
    rows = [
        (
            f"this swarm, {counted(summary.num_peers_seen, 'peer')}",
            summary.heldout_bits_per_byte_last,
        ),
        ("one process, same tokens", summary.one_process_bits_per_byte),
        ("interpolated bigram", summary.bigram_bits_per_byte),
        ("gzip -9", summary.gzip_bits_per_byte),
    ]
    for name, value in rows:
        table.add_row(name, f"{value:.3f}")
    books = Table(title="books", title_justify="left", show_header=False)
    books.add_column("what")
    books.add_column("value", justify="right")
    digests = "equal on every member of every step" if summary.state_digests_equal else "DIFFER"
    for name, text in (
        ("credited / budget tokens", f"{summary.credited_tokens:,} / {summary.budget_tokens:,}"),
        ("trained but not credited", f"{summary.uncredited_trained_tokens:,}"),
        ("rolled back", f"{summary.rolled_back_tokens:,}"),
        ("outer steps", f"{summary.outer_steps_committed:,}"),
        ("training seconds", f"{summary.train_seconds:,.0f}"),
        ("tokens per second", f"{summary.goodput_tokens_per_second:,.0f}"),
        ("state digests", digests),
        ("ledger violations", str(len(summary.ledger_violations))),
        *((f"credited to {name}", f"{n:,}") for name, n in summary.credited_tokens_by_peer.items()),
    ):
        books.add_row(name, text)
    console = Console(width=78, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(table)
        console.print(books)
    return capture.get()
