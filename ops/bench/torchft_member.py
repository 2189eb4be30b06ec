"""One replica of torchft, or its lighthouse, for ops/bench/torchft: runs in an environment in which
torchft is installed (it needs nothing of this repository) and is told what to do over standard
input, a JSON object a line each way.

The addresses are loopback; each replica is a group of one process with a store of its own, as
torchrun makes it. Timeouts and the rest come from the parent.
"""

import datetime
import hashlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import TCPStore
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo
from torchft.coordination import LighthouseServer

HOST = "127.0.0.1"
_STORES: list[TCPStore] = []
"""Kept: a store's server ends with the object, and a manager holds a client only."""


def tell(**fields: Any) -> None:
    """Answer the parent."""
    print(json.dumps(fields), flush=True)


def cpu_seconds() -> float:
    """CPU time of this process with all threads, torchft's own manager server among them."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def memory_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def lighthouse(config: dict[str, Any]) -> None:
    """Serve until the parent closes."""
    server = LighthouseServer(
        bind=f"{HOST}:0",
        min_replicas=1,
        join_timeout_ms=config["join_timeout_ms"],
        quorum_tick_ms=config["quorum_tick_ms"],
        heartbeat_timeout_ms=config["heartbeat_timeout_ms"],
    )
    tell(address=f"http://{HOST}:{server.address().rpartition(':')[2]}")
    sys.stdin.read()


def make_manager(config: dict[str, Any], **states: Any) -> Manager:
    """A manager of a replica group of one process."""
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    _STORES.append(store)
    return Manager(
        pg=ProcessGroupGloo(timeout=datetime.timedelta(seconds=config["gloo_timeout_seconds"])),
        min_replica_size=1,
        replica_id=config["name"],
        timeout=datetime.timedelta(seconds=config["manager_timeout_seconds"]),
        rank=0,
        world_size=1,
        store_addr=HOST,
        store_port=store.port,
        lighthouse_addr=config["lighthouse"],
        hostname=HOST,
        **states,
    )


class Reducer:
    """Averages a vector and adds the average to its state, step by step."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.state = torch.zeros(config["num_values"])
        self._noise = torch.Generator().manual_seed(int(config["name"][-1]))
        self.vector = torch.empty_like(self.state)
        self.manager = make_manager(
            config,
            load_state_dict=lambda held: self.state.copy_(held["state"]),
            state_dict=lambda: {"state": self.state},
        )

    def attempt(self, *, is_victim: bool) -> dict[str, Any]:
        """One step of torchft: quorum, all-reduce, vote. A victim waits for its end in it."""
        torch.randn(self.vector.shape, generator=self._noise, out=self.vector)
        Path("/proc/self/clear_refs").write_text("5")
        idle_bytes, begin = memory_bytes("VmRSS"), time.monotonic()
        self.manager.start_quorum()
        self.manager.wait_quorum()
        met, cpu = time.monotonic(), cpu_seconds()
        if is_victim:
            tell(is_in_reduce=True)
            time.sleep(1.0)  # killed or stopped in here; a stopped one goes on afterwards
        self.manager.allreduce(self.vector).wait()
        error = self.manager.errored()
        has_committed = self.manager.should_commit()
        done = {"quorum_seconds": met - begin, "wall_seconds": time.monotonic() - met}
        done |= {"cpu_seconds": cpu_seconds() - cpu, "has_committed": has_committed}
        done["extra_bytes"] = memory_bytes("VmHWM") - idle_bytes
        done["num_participants"] = self.manager.num_participants()
        done["error"] = str(error.original_exception).splitlines()[0] if error else ""
        if has_committed:
            self.state += self.vector
        return done

    def run(self) -> None:
        """Reach the step that the parent names, by as many attempts as it takes."""
        tell(is_ready=True)
        for line in sys.stdin:
            order = json.loads(line)
            attempts = []
            while self.manager.current_step() < order["to_step"]:
                attempts.append(self.attempt(is_victim=order.pop("is_victim", False)))
            digest = hashlib.sha256(self.state.numpy(force=True).data).hexdigest()
            tell(step=self.manager.current_step(), attempts=attempts, digest=digest)


def train(config: dict[str, Any]) -> None:
    """Train on noise until killed, as torchft's README does it; tell of each step. The model has
    the widths of Muster's default one, of torch's own layers.
    """
    sizes = config["sizes"]
    layer = nn.TransformerEncoderLayer(
        sizes["d_model"], sizes["num_heads"], sizes["d_ff"], dropout=0.0, batch_first=True
    )
    model = nn.Sequential(
        nn.Embedding(sizes["vocab_size"], sizes["d_model"]),
        nn.TransformerEncoder(layer, sizes["num_layers"]),
        nn.Linear(sizes["d_model"], sizes["vocab_size"], bias=False),
    )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    manager = make_manager(
        config,
        load_state_dict=lambda held: (
            model.load_state_dict(held["model"]),
            optimizer.load_state_dict(held["optim"]),
        ),
        state_dict=lambda: {"model": model.state_dict(), "optim": optimizer.state_dict()},
    )
    replica = DistributedDataParallel(manager, model)
    optimizer = Optimizer(manager, torch.optim.AdamW(model.parameters()))
    shape = (config["tokens"] // sizes["seq_len"], sizes["seq_len"])
    while True:
        inputs = torch.randint(sizes["vocab_size"], shape)
        before = manager.current_step()
        optimizer.zero_grad()
        logits = replica(inputs)
        nn.functional.cross_entropy(logits.flatten(0, 1), inputs.flatten()).backward()
        optimizer.step()
        tell(
            unix_seconds=time.time(),
            step=manager.current_step(),
            is_contributing=manager.is_participating() and manager.current_step() == before + 1,
            num_participants=manager.num_participants(),
            num_parameters=num_parameters,
        )


def main() -> None:
    """torchft_member.py lighthouse|reduce|train CONFIG."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    kind, config = sys.argv[1], json.loads(sys.argv[2])
    if kind == "lighthouse":
        lighthouse(config)
    elif kind == "reduce":
        Reducer(config).run()
    else:
        train(config)


if __name__ == "__main__":
    main()
