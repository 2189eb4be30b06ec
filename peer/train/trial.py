"""One trial of a study: a small model trained alone at a constant learning rate, evaluated on
held-out text at the marks it was given.

`python -m peer.train.trial --spec SPEC --dataset DIR --marks T1,T2,... --result FILE --threads K`
in a process of its own beside the daemon. Data order, initial values and update are those of a run
with this spec (train/reference.py); nothing is averaged with anybody. The result is written whole
or not at all. With `--channel-fd` the daemon hears about once a second that training comes round,
and what a turn may take, so that it can end a process that hangs (daemon/child_watch.py).

A loss that is not finite, or twice that of the first update, ends the trial as diverged: that is a
result (this learning rate is too high for this model), not a failure.
"""

import argparse
import contextlib
import gc
import hashlib
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from peer.ipc import Channel, ChannelClosed
from peer.parallel.devices import keep_freed_memory
from peer.parent_death import die_with_parent
from peer.train.reference import ReferenceRun
from protos.contract.errors import MusterError, RunFailedError, UsageError
from protos.contract.model_shape import COUNTING_CONVENTION, ModelShape
from protos.contract.run_spec import RunSpec

_EXPLODED_RATIO = 2.0
"""Loss of an update against that of the first, which is about a guess."""
_TELL_SECONDS = 1.0

Tell = Callable[[float], None]
"""Called with the longest that a turn may take now, in seconds."""


class _Turns:
    """Tells about once a second that the loop comes round."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._longest_seconds = 0.0
        self._last_seconds = time.monotonic()
        self._told_seconds = 0.0

    def turn(self) -> None:
        """One update was made."""
        now_seconds = time.monotonic()
        self._longest_seconds = max(self._longest_seconds, now_seconds - self._last_seconds)
        self._last_seconds = now_seconds
        if now_seconds - self._told_seconds >= _TELL_SECONDS:
            self._told_seconds = now_seconds
            self._tell(self._longest_seconds)

    def expect(self, num_updates: float) -> None:
        """What comes now takes as long as so many updates."""
        self._last_seconds = self._told_seconds = time.monotonic()
        self._tell(self._longest_seconds * max(num_updates, 1.0))

    def resume(self) -> None:
        """That is over."""
        self._last_seconds = time.monotonic()


def _train_to(run: ReferenceRun, mark: int, turns: _Turns, first_nats: float) -> tuple[float, str]:
    """Train to a mark; (mean loss of the first update, why training diverged or "")."""
    while run.schedule_tokens < mark:
        try:
            loss_nats = run.advance()
        except RunFailedError as error:
            return first_nats, f"{error.found}, after {run.schedule_tokens:,} tokens"
        turns.turn()
        first_nats = first_nats or loss_nats
        if loss_nats > _EXPLODED_RATIO * first_nats:
            return first_nats, (
                f"loss {loss_nats:.3g} nats after {run.schedule_tokens:,} tokens, more than "
                f"{_EXPLODED_RATIO:g} times the {first_nats:.3g} of the first update"
            )
    return first_nats, ""


def run_trial(
    spec: RunSpec, dataset_dir: Path, marks: list[int], *, tell: Tell = lambda seconds: None
) -> dict[str, Any]:
    """Train to every mark in turn; plain data with the fields of duties.proto's TrialResult.

    Raises UsageError for marks that do not rise to the budget.
    """
    if not marks or marks != sorted(set(marks)) or marks[-1] != spec.budget_tokens:
        raise UsageError(
            f"marks {marks} of a budget of {spec.budget_tokens} tokens",
            allowed="rising numbers of tokens, the last one the budget",
            remedy="run coordinator and peer from the same version",
        )
    shape = ModelShape.from_spec(spec.model)
    run = ReferenceRun(spec, dataset_dir)
    eval_tokens = spec.data.eval_tokens or sum(
        chunk.num_tokens for chunk in run.manifest.heldout_chunks
    )
    turns = _Turns(tell)
    points = []
    train_seconds = first_nats = 0.0
    divergence = ""
    for mark in marks:
        begin = time.monotonic()
        first_nats, divergence = _train_to(run, mark, turns, first_nats)
        train_seconds += time.monotonic() - begin
        if divergence:
            break
        turns.expect(eval_tokens / spec.strategy.global_batch_tokens)
        found = run.evaluate(eval_tokens=spec.data.eval_tokens)
        turns.resume()
        if not math.isfinite(found.total_nats):
            divergence = f"held-out loss not finite after {run.schedule_tokens:,} tokens"
            break
        points.append(
            {
                "tokens": run.schedule_tokens,
                "total_nats": found.total_nats,
                "num_tokens": found.num_tokens,
                "num_bytes": found.num_bytes,
            }
        )
    return {
        "run_digest": spec.run_digest,
        "seed": spec.seed,
        "convention": COUNTING_CONVENTION,
        "params_n": shape.num_matmul_parameters,
        "flop_per_token": shape.flop_per_token(),
        "points": points,
        "params_digest": hashlib.sha256(run.params.tobytes()).hexdigest(),
        "train_seconds": train_seconds,
        "divergence": divergence,
    }


def _tell_daemon(channel: Channel | None, seconds: float) -> None:
    if channel is not None:
        with contextlib.suppress(ChannelClosed):  # a daemon that is gone takes this process along
            channel.send("turn", longest_turn_seconds=seconds)


def main(arguments: list[str]) -> int:
    """Command line; 0, or the error's exit code with its message on standard error."""
    die_with_parent(signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    parser = argparse.ArgumentParser(prog="python -m peer.train.trial", description=__doc__)
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--marks", required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--channel-fd", type=int, default=-1, help="of the daemon, if any")
    options = parser.parse_args(arguments)
    channel = None if options.channel_fd < 0 else Channel.from_fd(options.channel_fd)
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    gc.freeze()
    try:
        spec = RunSpec.from_wire(options.spec.read_bytes())
        marks = [int(part) for part in options.marks.split(",")]
        result = run_trial(spec, options.dataset, marks, tell=partial(_tell_daemon, channel))
    except MusterError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    part = options.result.with_name(options.result.name + ".part")
    part.write_text(json.dumps(result), encoding="ascii")
    os.replace(part, options.result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
