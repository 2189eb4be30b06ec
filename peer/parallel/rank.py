"""Entry of a local rank other than the leader: `python -m peer.parallel.rank --channel-fd N`.

It does what the leader says, one message after the other, and answers each; what goes wrong is the
last answer. It dies with the leader.
"""

import argparse
import gc
import logging
import mmap
import os
import signal
import sys
from typing import Any

import numpy as np
import torch

from peer.ipc import Channel, ChannelClosed, Message
from peer.model.objectives import Examples
from peer.parallel.bridge import CanonicalVector
from peer.parallel.devices import (
    choose_device,
    is_device_lost,
    is_out_of_memory,
    keep_freed_memory,
)
from peer.parallel.engine import RankEngine
from peer.parallel.mesh import close_groups, open_groups, open_store
from peer.parallel.rank_messages import examples_from, layout_from, specs_from
from peer.parent_death import die_with_parent, end_process
from protos.contract.model_shape import ModelShape

_LOGGER = logging.getLogger(__name__)


def map_vector(fd: int, shape: ModelShape) -> CanonicalVector:
    """The node's canonical vector in inherited shared memory."""
    mapped = mmap.mmap(fd, os.fstat(fd).st_size)
    return CanonicalVector(shape, np.frombuffer(mapped, dtype="<f4", count=shape.num_parameters))


class LocalRank:
    """A rank at work; the leader has one too."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.engine: RankEngine | None = None
        self._vector: CanonicalVector | None = None

    def configure(self, message: Message) -> dict[str, Any]:
        """Join the groups of a layout and build this rank's part of the model."""
        self.close()
        model, self._optimizer = specs_from(message)
        layout = layout_from(message["layout"])
        torch.set_num_threads(message["num_threads"])
        device = choose_device(message["devices"][self.rank])
        if device.type == "cuda":
            torch.cuda.set_device(device)
        groups = open_groups(
            layout,
            rank=self.rank,
            store=open_store(message["store_fd"]),
            generation=message["generation"],
            timeout_seconds=message["timeout_seconds"],
            device_type=device.type,
        )
        self.engine = RankEngine(model, layout, rank=self.rank, groups=groups, device=device)
        self._vector = map_vector(message["vector_fd"], ModelShape.from_spec(model))
        gc.collect()
        gc.freeze()
        return {"num_values": self.engine.num_values}

    def run(self, examples: Examples, *, is_bf16: bool, is_watched: bool) -> dict[str, Any]:
        """Forward and backward; `layer_sums` of a turn that is watched."""
        assert self.engine is not None
        self.engine.is_bf16 = is_bf16
        run = self.engine.watch if is_watched else self.engine.run
        total_nats, is_finite = run(examples)
        answer = {"total_nats": total_nats, "is_finite": is_finite}
        return answer | ({"layer_sums": self.engine.layer_sums} if is_watched else {})

    def do(self, message: Message) -> dict[str, Any]:
        """Whatever needs no data."""
        engine, vector = self.engine, self._vector
        assert engine is not None and vector is not None
        match message["kind"]:
            case "load":
                engine.load(vector)
            case "store":
                engine.store(vector)
            case "store_grads":
                engine.store_grads(vector)
            case "norm":
                engine.finish()
                return {"norm": engine.grad_norm()}
            case "zero":
                engine.zero()
            case "inner_step":
                engine.inner_step(
                    self._optimizer,
                    num_tokens=message["num_tokens"],
                    learning_rate=message["learning_rate"],
                )
            case kind:
                raise AssertionError(f"message {kind!r} to a local rank")
        return {}

    def close(self) -> None:
        """Leave the groups and drop the model."""
        self.engine = self._vector = None
        close_groups()


def serve(channel: Channel, rank: int) -> None:
    """Answer the leader until it stops or is gone."""
    local = LocalRank(rank)
    channel.send("started")
    while (message := channel.receive())["kind"] != "stop":
        match message["kind"]:
            case "configure":
                answer = local.configure(message)
            case "run":
                examples = examples_from(message["examples"])
                answer = local.run(
                    examples, is_bf16=message["is_bf16"], is_watched=message["is_watched"]
                )
            case _:
                answer = local.do(message)
        channel.send("done", **answer)


def main(arguments: list[str]) -> int:
    """Run; what goes wrong is told to the leader."""
    die_with_parent(signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    parser = argparse.ArgumentParser(prog="python -m peer.parallel.rank", description=__doc__)
    parser.add_argument("--channel-fd", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    channel = Channel.from_fd(options.channel_fd)
    try:
        serve(channel, options.rank)
    except ChannelClosed:
        return 0
    except (RuntimeError, MemoryError, OSError, ValueError, AssertionError) as error:
        _LOGGER.exception("rank %d failed", options.rank)
        reason = f"{type(error).__name__}: {error}"
        channel.send(
            "failed",
            reason=reason,
            is_out_of_memory=is_out_of_memory(error),
            is_device_lost=is_device_lost(error),
        )
        return 1
    return 0


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
