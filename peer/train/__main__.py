"""Entry of the trainer process: `python -m peer.train --channel-fd N --vectors-fd M --num-values
K`.

Both descriptors are inherited from the daemon: its channel and the shared vectors. The process dies
with the daemon at once, whatever it is doing, because nothing that it holds outlives it: leases
expire or are released by the daemon.
"""

import argparse
import gc
import logging
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from peer.data.feed import Feed
from peer.data.reader import ChunkReader
from peer.eval.evaluate import token_byte_lengths
from peer.ipc import Channel, Message
from peer.model.objectives import ExampleBuilder
from peer.model.probe import LayerStats
from peer.parallel.devices import (
    describe_device,
    is_device_lost,
    is_out_of_memory,
    keep_freed_memory,
)
from peer.parallel.faults import LocalRankError
from peer.parent_death import die_with_parent, end_process
from peer.shared_vectors import SharedVectors
from peer.train.bad_batches import BadBatches
from peer.train.duty import EvaluationDesk
from peer.train.link import DaemonLink
from peer.train.loop import TrainLoop
from peer.train.node_step import NodeStep
from peer.train.probed_step import ProbedNodeStep, ProbedStep, Timer
from peer.train.step import MicroStep
from peer.train.workbench import Workbench, build_workbench, leader_position
from protos.contract.errors import MusterError, UsageError
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import RunSpec

_EXIT_UNEXPECTED = 1
_WAIT_SECONDS = 60.0
_LOGGER = logging.getLogger(__name__)


def build_loop(message: Message, *, vectors: SharedVectors, link: DaemonLink) -> TrainLoop:
    """Set everything up from the daemon's `configure` and answer `ready`. Raises MusterError."""
    spec = RunSpec.from_wire(message["run_spec"])
    torch.manual_seed(message["seed"])
    num_values = ModelShape.from_spec(spec.model).num_parameters
    if num_values != vectors.num_values:
        raise UsageError(
            f"shared vectors of {vectors.num_values} values, a model of {num_values}",
            allowed="the number of parameters that the run spec gives",
            remedy="run daemon and trainer from the same installation",
        )
    bench = build_workbench(spec, message, vectors)
    _LOGGER.info("step plan: %s", bench.reason)
    byte_lengths = token_byte_lengths(Path(message["tokenizer_path"]))
    builder = ExampleBuilder.for_run(spec, byte_lengths)
    seq_len = spec.model.seq_len
    reader = ChunkReader(builder, seed=spec.seed, seq_len=seq_len, vocab_size=byte_lengths.size)
    loop = TrainLoop(
        step=probed(bench, message.get("probe_interval_seconds", 0.0), link),
        strategy=bench.strategy,
        feed=Feed(seq_len=seq_len, read_windows=reader.read_windows),
        vectors=vectors,
        link=link,
        desk=EvaluationDesk(
            bench.step, vectors=vectors, link=link, byte_lengths=byte_lengths, builder=builder
        ),
        micro_batch_sequences=bench.turn_sequences,
        bad_batches=BadBatches(Path(message["bad_batch_path"])),
    )
    loop.reports.least_turn_seconds = bench.least_turn_seconds
    loop.reports.expect_batches_of(bench.turn_seconds)
    info = describe_device(bench.step.device, num_threads=torch.get_num_threads())
    link.send(
        "ready",
        torch_version=torch.__version__,
        device=f"{bench.devices_text} {info.name} {bench.step.how}",
        num_threads=info.num_threads,
        micro_batch_sequences=bench.turn_sequences,
        layout=bench.layout.text,
        num_ranks=bench.layout.num_ranks,
        reason=bench.reason,
        can_save_memory=not bench.layout.has_checkpointing,
    )
    return loop


def probed(bench: Workbench, interval_seconds: float, link: DaemonLink) -> MicroStep | NodeStep:
    """The step, watched if the owner asks for it."""
    if interval_seconds <= 0:
        return bench.step

    def report(stats: tuple[LayerStats, ...]) -> None:
        link.send("layer_stats", layers=[asdict(layer) for layer in stats])

    timer = Timer(interval_seconds)
    if isinstance(bench.step, MicroStep):
        return ProbedStep(bench.step, timer=timer, report=report)
    return ProbedNodeStep(bench.step, timer=timer, report=report)


def run_trainer(link: DaemonLink, vectors: SharedVectors) -> str:
    """Wait for `configure`, then train until told to stop; returns the reason."""
    early: list[Message] = []
    while not early:
        early = link.receive(wait_seconds=_WAIT_SECONDS)
    first, *others = early
    if first["kind"] in ("stop", "closed"):
        return "asked to stop before it was configured"
    if first["kind"] != "configure":
        raise UsageError(
            f"first message {first['kind']!r}",
            allowed="configure",
            remedy="run daemon and trainer from the same installation",
        )
    try:
        loop = build_loop(first, vectors=vectors, link=link)
        for message in others:
            loop.state.fold(message)
        gc.freeze()
        return loop.run()
    except RuntimeError as error:
        if isinstance(error, LocalRankError) or not is_device_lost(error):
            raise
        raise LocalRankError(
            f"the device is lost: {error}", lost_devices=[leader_position(first)]
        ) from error


def main(arguments: list[str]) -> int:
    """Run; what goes wrong is reported to the daemon as `failed` and gives a non-zero exit
    code.
    """
    die_with_parent(signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the daemon alone decides when the trainer ends
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    parser = argparse.ArgumentParser(prog="python -m peer.train", description=__doc__)
    parser.add_argument("--channel-fd", type=int, required=True)
    parser.add_argument("--vectors-fd", type=int, required=True)
    parser.add_argument("--num-values", type=int, required=True)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    link = DaemonLink(Channel.from_fd(options.channel_fd))
    exit_code = 0
    try:
        reason = run_trainer(link, SharedVectors(options.vectors_fd, options.num_values))
        _LOGGER.info("trainer ends: %s", reason)
    except MusterError as error:
        link.send("failed", reason=str(error), is_out_of_memory=False, exit_code=error.exit_code)
        exit_code = error.exit_code
    except LocalRankError as error:
        link.send(
            "failed",
            reason=str(error),
            is_out_of_memory=error.has_no_memory,
            lost_devices=list(error.lost_devices),
        )
        exit_code = _EXIT_UNEXPECTED
    except (RuntimeError, MemoryError, OSError, ValueError, AssertionError) as error:
        _LOGGER.exception("trainer failed")
        link.send(
            "failed",
            reason=f"{type(error).__name__}: {error}",
            is_out_of_memory=is_out_of_memory(error),
        )
        exit_code = _EXIT_UNEXPECTED
    finally:
        link.close()
    return exit_code


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
