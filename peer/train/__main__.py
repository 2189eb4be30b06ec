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
from pathlib import Path

import torch

from peer.data.feed import Feed
from peer.data.reader import ChunkReader
from peer.eval.evaluate import token_byte_lengths
from peer.ipc import Channel, Message
from peer.model.decoder import Decoder, FlatParameters
from peer.model.objectives import ExampleBuilder
from peer.parallel.devices import choose_device, describe_device, keep_freed_memory
from peer.parent_death import die_with_parent
from peer.shared_vectors import SharedVectors
from peer.train.duty import EvaluationDesk
from peer.train.link import DaemonLink
from peer.train.loop import TrainLoop
from peer.train.step import MicroStep, probe_plan
from peer.train.strategies import build_strategy
from protos.contract.errors import MusterError, UsageError
from protos.contract.run_spec import RunSpec

_EXIT_UNEXPECTED = 1
_WAIT_SECONDS = 60.0
_LOGGER = logging.getLogger(__name__)


def build_loop(message: Message, *, vectors: SharedVectors, link: DaemonLink) -> TrainLoop:
    """Set everything up from the daemon's `configure` and answer `ready`. Raises MusterError."""
    spec = RunSpec.from_wire(message["run_spec"])
    torch.set_num_threads(message["num_threads"])
    torch.manual_seed(message["seed"])
    device = choose_device(message["device"])
    model = Decoder(spec.model, device=device)
    parameters = FlatParameters(model, device=device)
    if parameters.values.numel() != vectors.num_values:
        raise UsageError(
            f"shared vectors of {vectors.num_values} values, "
            f"a model of {parameters.values.numel()}",
            allowed="the number of parameters that the run spec gives",
            remedy="run daemon and trainer from the same installation",
        )
    step = MicroStep(model, parameters)
    plan = probe_plan(step)
    _LOGGER.info("step plan: %s", plan.reason)
    bound = message["max_micro_batch_sequences"] or plan.micro_batch_sequences
    sequences = min(plan.micro_batch_sequences, bound)
    seq_len = spec.model.seq_len
    byte_lengths = token_byte_lengths(Path(message["tokenizer_path"]))
    builder = ExampleBuilder.for_run(spec, byte_lengths)
    reader = ChunkReader(builder, seed=spec.seed, seq_len=seq_len, vocab_size=byte_lengths.size)
    loop = TrainLoop(
        step=step,
        strategy=build_strategy(spec, model, parameters, vectors),
        feed=Feed(seq_len=seq_len, read_windows=reader.read_windows),
        vectors=vectors,
        link=link,
        desk=EvaluationDesk(
            step, vectors=vectors, link=link, byte_lengths=byte_lengths, builder=builder
        ),
        micro_batch_sequences=sequences,
    )
    loop.reports.expect_batches_of(sequences * plan.sequence_seconds)
    info = describe_device(device, num_threads=torch.get_num_threads())
    link.send(
        "ready",
        torch_version=torch.__version__,
        device=f"{info.device} {info.name} {plan.precision.value}",
        num_threads=info.num_threads,
        micro_batch_sequences=sequences,
    )
    return loop


def run_trainer(link: DaemonLink, vectors: SharedVectors) -> str:
    """Wait for `configure`, then train until told to stop; returns the reason."""
    early: list[Message] = []
    while not early:
        early = link.receive(wait_seconds=_WAIT_SECONDS)
    first, *others = early
    if first["kind"] in ("stop", "closed"):
        return "asked to stop before it was configured"
    if first["kind"] != "configure":
        raise UsageError(f"first message {first['kind']!r}", allowed="configure")
    loop = build_loop(first, vectors=vectors, link=link)
    for message in others:
        loop.state.fold(message)
    gc.freeze()
    return loop.run()


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


def is_out_of_memory(error: Exception) -> bool:
    """True for torch's and Python's ways to say so."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("not enough memory", "can't allocate memory")  # torch on CPU: Windows, Linux
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
