"""A daemon's end of the trainer's channel, with real shared memory, real chunk files and the real
exact update.
"""

import hashlib
import json
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peer.data.reader import ChunkReader, leased_range_from_signed
from peer.ipc import Channel, Message
from peer.model.decoder import Decoder, FlatParameters
from peer.model.init import initial_vector
from peer.model.loss import examples_on, summed_loss
from peer.model.objectives import ExampleBuilder
from peer.shared_vectors import SharedVectors, StatePosition
from peer.swarm.fragments import FragmentPlan
from peer.swarm.outer_update import exact_update_for
from peer.train.__main__ import build_loop
from peer.train.link import DaemonLink
from peer.train.step import MicroStep, Precision
from protos.contract.chunk_format import chunk_from_tokens
from protos.contract.digest import Float32Vector
from protos.contract.run_spec import RunSpec
from protos.muster.v1 import common_pb2
from tests.peer.model.tiny import SPEC

STEP_CACHE = tempfile.TemporaryDirectory(prefix="muster-test-step-")
"""Kernels and step plans, built and measured once for all tests of a process."""
ROOT = Path(__file__).resolve().parents[3]
DEADLINE_SECONDS = 90.0
CHUNK_WINDOWS = 40
SCHEDULE = {"cooldown_start_tokens": 10**6, "budget_tokens": 10**7}


@dataclass
class FakeDaemon:
    """Sends what a daemon sends and waits for what a trainer answers."""

    channel: Channel
    vectors: SharedVectors
    folder: Path
    spec: RunSpec = SPEC
    seen: list[Message] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    end_reasons: list[str | BaseException] = field(default_factory=list)
    offer_number: int = 0
    """Of the newest contribution that was seen."""

    def __post_init__(self) -> None:
        spec = self.spec.model
        tokens = np.arange(CHUNK_WINDOWS * spec.seq_len + 1) * 7 % spec.vocab_size
        data = chunk_from_tokens(tokens, vocab_size=spec.vocab_size)
        self.chunk_digest = hashlib.sha256(data).digest()
        self.chunk_path = self.folder / self.chunk_digest.hex()
        self.chunk_path.write_bytes(data)
        vocab = {"ab" if index % 2 else chr(0x100 + index): index for index in range(2)}
        pairs = [chr(65 + index // 26) + chr(65 + index % 26) for index in range(26 * 26)]
        vocab |= {pairs[index]: index for index in range(2, spec.vocab_size)}
        plain = {"model": {"vocab": vocab}, "added_tokens": [{"id": 0, "content": "<eos>"}]}
        (self.folder / "tokenizer.json").write_text(json.dumps(plain))
        self._update = exact_update_for(self.spec)
        self.write_state(0, 0, initial_vector(self.spec))

    @property
    def configuration(self) -> dict[str, Any]:
        return {
            "run_spec": self.spec.to_wire(),
            "num_threads": 1,
            "device": "cpu",
            "heldout_paths": [str(self.chunk_path)],
            "tokenizer_path": str(self.folder / "tokenizer.json"),
            "seed": 1,
            "max_micro_batch_sequences": None,
            "bad_batch_path": str(self.folder / "bad"),
            "execution": "auto",
            "step_cache_path": STEP_CACHE.name,
        }

    def send(self, kind: str, **fields: Any) -> None:
        self.channel.send(kind, **fields)

    def expect(self, kind: str) -> Message:
        """Next message of this kind; others are remembered in `seen`.

        Fails after the socket's timeout.
        """
        while True:
            message = self.channel.receive()
            self.seen.append(message)
            if message["kind"] == "contribution_ready":
                self.offer_number = message["offer_number"]
            if message["kind"] == kind:
                return message
            assert message["kind"] != "failed", message

    def write_state(
        self,
        incarnation: int,
        outer_step: int,
        params: Float32Vector,
        *,
        schedule_tokens: int = 0,
        state_digest: bytes = bytes(32),
    ) -> None:
        position = StatePosition(
            incarnation=incarnation,
            outer_step=outer_step,
            schedule_tokens=schedule_tokens,
            directive_number=1,
            state_digest=state_digest,
            **SCHEDULE,
        )
        with self.vectors.writing_state(position):
            self.vectors.params[:] = params

    def commit(self) -> None:
        """What the swarm process does with a contribution that is alone in its round."""
        old = self.vectors.position()
        new = StatePosition(
            incarnation=old.incarnation,
            outer_step=old.outer_step + 1,
            schedule_tokens=old.schedule_tokens + 96,
            directive_number=1,
            **SCHEDULE,
        )
        fragment = FragmentPlan(self.spec).of_outer_step(new.outer_step)
        with self.vectors.writing_state(new):
            self._update.apply(
                *self.vectors.state_vectors(),
                self.vectors.contribution[: fragment.num_values],
                update_number=new.outer_step,
                schedule_tokens=old.schedule_tokens,
                cooldown_start_tokens=SCHEDULE["cooldown_start_tokens"],
                budget_tokens=SCHEDULE["budget_tokens"],
            )

    def lease(self, number: int, begin: int, end: int, *, incarnation: int = 0) -> dict[str, Any]:
        lease = common_pb2.Lease(
            run_id="test",
            incarnation=incarnation,
            peer_id="p",
            lease_number=number,
            fence=1,
            range=common_pb2.WindowRange(begin_window=begin, end_window=end),
            chunk_digest=self.chunk_digest,
        )
        signed = common_pb2.Signed(payload=lease.SerializeToString(), signature=bytes(64))
        return {
            "lease": signed.SerializeToString(),
            "lease_number": number,
            "data_pass": 0,
            "chunk_index": 0,
            "begin_window": begin,
            "end_window": end,
            "path": str(self.chunk_path),
        }

    def give(self, *leases: dict[str, Any]) -> None:
        self.send("leases", leases=list(leases))

    def announce(self, *, round_windows: int) -> None:
        """state_ready for the state in shared memory."""
        position = self.vectors.position()
        self.send(
            "state_ready",
            incarnation=position.incarnation,
            outer_step=position.outer_step,
            round_tokens=round_windows * self.spec.model.seq_len,
        )

    def end_round(
        self, outcome: str, *, round_windows: int, reason: str = "", offer_number: int | None = None
    ) -> None:
        """The verdict on the newest contribution that was seen, or on another."""
        position = self.vectors.position()
        self.send(
            "round_outcome",
            outcome=outcome,
            incarnation=position.incarnation,
            outer_step=position.outer_step,
            round_tokens=round_windows * self.spec.model.seq_len,
            reason=reason,
            offer_number=self.offer_number if offer_number is None else offer_number,
        )

    def mean_gradient(self, contribution: Message) -> Float32Vector:
        """What the ranges of a contribution should give on the state in shared memory, in fp32."""
        builder = ExampleBuilder(
            self.spec.objective,
            seed=self.spec.seed,
            num_text_tokens=self.spec.model.vocab_size,
            eos_token_id=0,
        )
        reader = ChunkReader(
            builder,
            seed=self.spec.seed,
            seq_len=self.spec.model.seq_len,
            vocab_size=self.spec.model.vocab_size,
        )
        model = Decoder(self.spec.model)
        flat = FlatParameters(model)
        self.vectors.read_params(flat.values.numpy())
        num_tokens = 0
        for part in contribution["ranges"]:
            leased = leased_range_from_signed(part["lease"], path=self.chunk_path)
            examples = reader.read_windows(leased, part["begin_window"], part["end_window"])
            inputs_BT, labels_BT, _, _ = examples_on(examples, torch.device("cpu"))
            summed_loss(model(inputs_BT), labels_BT).backward()
            num_tokens += examples.num_tokens
        assert num_tokens == contribution["num_tokens"]
        return flat.grads.numpy() / np.float32(num_tokens)


def windows_of(contribution: Message) -> list[tuple[int, int]]:
    """(begin, end) of each range."""
    return [(part["begin_window"], part["end_window"]) for part in contribution["ranges"]]


def _pair(folder: Path, spec: RunSpec) -> tuple[FakeDaemon, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.settimeout(DEADLINE_SECONDS)
    num_values = initial_vector(spec).size
    vectors = SharedVectors.create(num_values, spec.strategy.state_vectors)
    return FakeDaemon(Channel(ours), vectors, folder, spec), theirs


@contextmanager
def trainer_process(folder: Path, *, spec: RunSpec = SPEC) -> Iterator[FakeDaemon]:
    """The real process, started as the daemon starts it."""
    daemon, theirs = _pair(folder, spec)
    arguments = ["--channel-fd", str(theirs.fileno()), "--vectors-fd", str(daemon.vectors.fd)]
    arguments += ["--num-values", str(daemon.vectors.num_values)]
    daemon.process = subprocess.Popen(
        [sys.executable, "-m", "peer.train", *arguments],
        cwd=ROOT,
        pass_fds=[theirs.fileno(), daemon.vectors.fd],
    )
    theirs.close()
    try:
        yield daemon
    finally:
        daemon.process.kill()
        daemon.process.wait()
        daemon.channel.close()


@contextmanager
def trainer_thread(
    folder: Path, *, micro_batch_sequences: int = 2, spec: RunSpec = SPEC
) -> Iterator[FakeDaemon]:
    """The loop on a thread of the test, in fp32: everything but the process around it."""
    daemon, theirs = _pair(folder, spec)
    attached = SharedVectors(daemon.vectors.fd, daemon.vectors.num_values)

    def work() -> None:
        link = DaemonLink(Channel(theirs))
        try:
            loop = build_loop(daemon.configuration, vectors=attached, link=link)
            loop.step.precision = Precision.FP32
            if isinstance(loop.step, MicroStep):
                loop.step.use_eager()
            loop.micro_batch_sequences = micro_batch_sequences
            daemon.end_reasons.append(loop.run())
        except BaseException as error:
            daemon.end_reasons.append(error)
        finally:
            link.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield daemon
    finally:
        daemon.channel.close()
        thread.join(DEADLINE_SECONDS)
    assert not thread.is_alive()
