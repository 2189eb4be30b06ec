"""What `up` shows while a run goes on: one live view on a terminal, plain lines anywhere else.

Pure rendering: `up.py` hands over a `RunView` about twice a second and says when a phase begins. A
peer's state is always shown with its reason. Everything goes to standard error, so standard output
stays free for results and `--json`.
"""

import math
import sys
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from protos.contract.command_line import ReaderGoneError

PLAIN_INTERVAL_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRow:
    """One peer as the coordinator sees it."""

    name: str
    state: str
    reason: str
    outer_step: int
    tokens_per_second: float
    """Claimed by the peer."""
    credited_tokens: int
    """Counted by the coordinator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """One look at a run."""

    run_state: str
    run_reason: str
    credited_tokens: int
    budget_tokens: int
    goodput_tokens_per_second: float
    """Credited tokens per second over the last minute."""
    outer_steps: int
    loss_nats: float | None
    heldout_bits_per_byte: float | None
    eta_seconds: float | None
    page_url: str
    peers: tuple[PeerRow, ...] = field(default_factory=tuple)

    def summary_line(self) -> str:
        """Everything but the peers in one line."""
        share = self.credited_tokens / self.budget_tokens if self.budget_tokens else 0.0
        loss = "-" if self.loss_nats is None else f"{self.loss_nats:.3f}"
        heldout = (
            ""
            if self.heldout_bits_per_byte is None
            else f", held-out {self.heldout_bits_per_byte:.3f} bits/byte"
        )
        return (
            f"{self.run_state}: {self.credited_tokens:,} of {self.budget_tokens:,} tokens "
            f"({share:.0%}), "
            f"loss {loss}{heldout}, {self.goodput_tokens_per_second:,.0f} tokens/s, outer step "
            f"{self.outer_steps}, "
            f"ETA {format_duration(self.eta_seconds)}"
        )


def format_duration(seconds: float | None) -> str:
    """1:05 for 65 seconds, 2:00:00 for two hours, - for unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Nobody watches any more: the run is stopped in good order, as for any other tool."""
        self.quiet = True
        raise ReaderGoneError


class UpView:
    """Shows phases and looks; use as a context manager."""

    def __init__(self, *, is_terminal: bool | None = None) -> None:
        self._console = _Console(stderr=True, highlight=False)
        self._is_live = sys.stderr.isatty() if is_terminal is None else is_terminal
        self._live: Live | None = None
        self._next_plain_monotonic_seconds = 0.0
        self._shown_state_by_peer: dict[str, tuple[str, str]] = {}
        self._shown_run_state: tuple[str, str] = ("", "")

    def __enter__(self) -> "UpView":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop_live()

    def say(self, line: str) -> None:
        """Print one line above the live view."""
        self._console.print(escape(line), soft_wrap=True)

    def show(self, view: RunView, *, now_monotonic_seconds: float) -> None:
        """Show a look at the run."""
        if self._is_live:
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False, transient=False)
                self._live.start()
            self._live.update(_render(view), refresh=True)
            return
        run_state = (view.run_state, view.run_reason)
        if run_state != self._shown_run_state:
            self._shown_run_state = run_state
            self.say(f"run is {view.run_state}: {view.run_reason}")
        for peer in view.peers:
            if self._shown_state_by_peer.get(peer.name, ("", ""))[0] != peer.state:
                self._shown_state_by_peer[peer.name] = (peer.state, peer.reason)
                self.say(f"peer {peer.name} is {peer.state}: {peer.reason}")
        if now_monotonic_seconds >= self._next_plain_monotonic_seconds:
            self._next_plain_monotonic_seconds = now_monotonic_seconds + PLAIN_INTERVAL_SECONDS
            self.say(view.summary_line())

    def stop_live(self) -> None:
        """Leave the last look standing and go on with plain lines."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def _render(view: RunView) -> Group:
    table = Table(box=None, pad_edge=False, expand=True)
    for title, justify in (
        ("peer", "left"),
        ("state", "left"),
        ("step", "right"),
        ("tokens/s", "right"),
    ):
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("credited", justify="right", no_wrap=True)
    table.add_column("reason", overflow="ellipsis", no_wrap=True, ratio=1)
    for peer in view.peers:
        table.add_row(
            escape(peer.name),
            peer.state,
            str(peer.outer_step),
            f"{peer.tokens_per_second:,.0f}",
            f"{peer.credited_tokens:,}",
            escape(peer.reason),
        )
    return Group(
        Text(view.summary_line()),
        ProgressBar(total=max(view.budget_tokens, 1), completed=view.credited_tokens),
        Text(f"{view.run_reason}   page: {view.page_url}", style="dim"),
        table,
    )
