"""One averaging peer for ops/bench/allreduce and ops/bench/wan/share: Muster's all-reduce or
hivemind's averager, told what to do over standard input, a JSON object a line each way.

CPU seconds are those of the process that averages (user and system, all threads) and of its p2pd.
Extra memory is the largest in a round less what was there before the first one: resident memory, of
hivemind, whose vector is shared and touched late, the unshared part, looked at every 5 ms.
"""

import argparse
import asyncio
import contextlib
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402

PIECE_COST_SEED = 7


def own_cpu_seconds() -> float:
    """CPU time of this process with all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def child_cpu_seconds(pid: int) -> float:
    """CPU time of another process with its living threads, to the nanosecond."""
    spent = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            spent += int(path.read_text().split()[0])
    return spent / 1e9


def memory_bytes(pid: int | str, field: str) -> int:
    """VmRSS or VmHWM of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak(pid: int | str) -> None:
    """Let VmHWM begin anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def tell(**fields: Any) -> None:
    """Answer the parent."""
    print(json.dumps(fields), flush=True)


async def orders() -> Any:
    """The parent's next order; None at the end."""
    line = await asyncio.to_thread(sys.stdin.readline)
    return json.loads(line) if line.strip() else None


async def _pong(peer_id: str, message: Any) -> Any:
    return message


class MusterPeer:
    """Averages with peer/swarm/allreduce.py over its own p2pd."""

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        self.name, self.config = name, config
        self.num_values: int = config["num_values"]
        self.idle_bytes = 0
        """Resident before the first round, the vector included."""
        rng = np.random.default_rng([PIECE_COST_SEED, ord(name[-1])])
        self.vector = rng.standard_normal(self.num_values, dtype=np.float32)

    async def start(self, folder: Path) -> None:
        """Start p2pd and tell where it is."""
        from peer.identity import load_identity
        from peer.swarm.buffer_pool import BufferPool
        from peer.swarm.reduction_desk import ReductionDesk
        from peer.swarm.transport import Transport
        from protos.muster.v1 import state_pb2

        identity = load_identity(folder)
        lanes = {"lanes_from_seconds": None} if self.config["is_one_connection"] else {}
        self.transport = await Transport.create(
            **lanes,
            home=folder,
            identity_path=identity.p2p_key_path,
            prefix="bench",
            host=self.config["host"],
            listen_port=0,
            upload_limit_mbit=self.config["upload_limit_mbit"],
        )
        self.p2pd_pid: int = self.transport.p2p._child.pid
        self.buffers = BufferPool()
        self.desk = ReductionDesk(self.transport)
        await self.desk.start()
        await self.transport.serve_messages("ping", _pong, state_pb2.StateInfoRequest)
        tell(p2p=self.transport.p2p_peer_id, addresses=await self.transport.addresses())

    def meet(self, members: dict[str, Any]) -> None:
        """Everybody's identity and addresses."""
        others = {name: m for name, m in members.items() if name != self.name}
        self.transport.set_members({name: m["p2p"] for name, m in others.items()})
        for name, member in others.items():
            self.transport.add_addresses(name, member["addresses"])
        self.names = sorted(members)

    async def round(self, number: int) -> None:
        """Commit, wait for everybody's commitments, average; tell what it cost."""
        from peer.swarm.allreduce import ReduceError, Reduction
        from peer.swarm.codecs import EncodedVector
        from protos.contract.codecs_wire import codec_named
        from protos.muster.v1 import rounds_pb2

        codec = codec_named(self.config["codec"])
        self.idle_bytes = self.idle_bytes or memory_bytes("self", "VmRSS")
        reset_peak("self")
        before = own_cpu_seconds()
        own = EncodedVector.encode(codec, self.vector)
        digests = own.digests()
        tell(digests=[d.hex() for d in digests], commit_cpu_seconds=own_cpu_seconds() - before)
        order = await orders()
        members = [
            rounds_pb2.JoinGroup(
                contribution=rounds_pb2.Contribution(
                    peer_id=name, ranges=[rounds_pb2.LeasedRange(end_window=1)]
                ),
                piece_digests=[bytes.fromhex(d) for d in order["digests"][name]],
            )
            for name in self.names
        ]
        group = rounds_pb2.FormGroup(members=members, reducer_piece_ends=order["ends"])
        self.desk.open(None)
        p2pd_rss = memory_bytes(self.p2pd_pid, "VmRSS")
        reset_peak(self.p2pd_pid)
        reduction = Reduction(
            self.transport,
            place=(1, number, 0),
            group=group,
            tokens_by_peer=dict.fromkeys(self.names, 1),
            own_peer_id=self.name,
            codec=codec,
            num_values=self.num_values,
            own=own,
            buffers=self.buffers,
        )
        tell(is_ready=True)
        await orders()
        python, p2pd, begin = own_cpu_seconds(), child_cpu_seconds(self.p2pd_pid), time.monotonic()
        self.desk.open(reduction)
        answer: dict[str, Any] = {}
        try:
            averaged = await asyncio.wait_for(reduction.run(), self.config["timeout_seconds"])
            answer["digest"] = averaged.averaged_digest.hex()
        except (ReduceError, TimeoutError) as error:
            answer["error"] = str(error) or "timeout"
        answer["wall_seconds"] = time.monotonic() - begin
        tell(is_done=True)
        await orders()  # everybody is done: what we served them counts as well
        tell(
            **answer,
            num_lanes=sum(way.num_lanes for way in self.transport.ways().values()),
            python_cpu_seconds=own_cpu_seconds() - python,
            p2pd_cpu_seconds=child_cpu_seconds(self.p2pd_pid) - p2pd,
            extra_bytes=memory_bytes("self", "VmHWM") - self.idle_bytes,
            p2pd_extra_bytes=memory_bytes(self.p2pd_pid, "VmHWM") - p2pd_rss,
        )

    async def close(self) -> None:
        """End p2pd."""
        await self.transport.close()


async def muster(name: str, config: dict[str, Any]) -> None:
    """Serve the parent's orders as a Muster peer."""
    peer = MusterPeer(name, config)
    with tempfile.TemporaryDirectory(prefix="avg") as folder:
        await peer.start(Path(folder))
        peer.meet((await orders())["members"])
        while (order := await orders()) and "round" in order:
            await peer.round(order["round"])
        await peer.close()


def hivemind_peer(config: dict[str, Any]) -> None:
    """Serve the parent's orders as a peer of hivemind 1.1.12's DecentralizedAverager."""
    import hivemind
    import torch
    from hivemind.averaging.control import AveragingStage
    from hivemind.compression import NoCompression, Uniform8BitQuantization

    torch.set_num_threads(1)
    first = json.loads(sys.stdin.readline())
    dht = hivemind.DHT(
        initial_peers=first["initial_peers"],
        host_maddrs=[f"/ip4/{config['host']}/tcp/0"],
        start=True,
    )
    size, part = config["num_values"], 4_000_000
    tensors = [torch.randn(min(part, size - begin)) for begin in range(0, size, part)]
    codec = Uniform8BitQuantization() if config["codec"] == "int8" else NoCompression()
    averager = hivemind.DecentralizedAverager(
        averaged_tensors=tensors,
        dht=dht,
        prefix="bench",
        target_group_size=config["num_peers"],
        min_matchmaking_time=config["matchmaking_seconds"],
        request_timeout=config["matchmaking_seconds"] / 2,
        allreduce_timeout=config["timeout_seconds"],
        compression=codec,
        start=True,
    )
    pid, p2pd_pid = averager.pid, int(_p2pd_of(dht.pid))
    tell(addresses=[str(address) for address in dht.get_visible_maddrs()])
    idle_bytes = memory_bytes(pid, "RssAnon")
    for line in sys.stdin:
        if "round" not in json.loads(line):
            break
        most_bytes, python, p2pd = 0, 0.0, 0.0
        control, begin, formed = (
            averager.step(wait=False, allow_retries=False),
            time.monotonic(),
            0.0,
        )
        while not control.done():
            if not formed and control.stage == AveragingStage.RUNNING_ALLREDUCE:
                formed = time.monotonic()
                python, p2pd = child_cpu_seconds(pid), child_cpu_seconds(p2pd_pid)
            most_bytes = max(most_bytes, memory_bytes(pid, "RssAnon"))
            time.sleep(0.005)
        end = time.monotonic()
        try:
            peers = len(control.result(timeout=1) or ())
        except Exception as error:  # noqa: BLE001 (a benchmark of somebody else's code reports any)
            tell(error=repr(error), wall_seconds=end - begin)
            continue
        tell(
            wall_seconds=end - formed,
            form_seconds=formed - begin,
            python_cpu_seconds=child_cpu_seconds(pid) - python,
            p2pd_cpu_seconds=child_cpu_seconds(p2pd_pid) - p2pd,
            extra_bytes=most_bytes - idle_bytes,
            num_peers=peers,
        )
    averager.shutdown()
    time.sleep(0.5)
    dht.shutdown()


def _p2pd_of(pid: int) -> str:
    """The p2pd that a hivemind process has started."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            if "p2pd" in Path(f"/proc/{child}/cmdline").read_text():
                return child
    raise LookupError(f"no p2pd under process {pid}")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("muster", "hivemind"))
    parser.add_argument("name")
    parser.add_argument("config", type=json.loads)
    arguments = parser.parse_args()
    if arguments.kind == "muster":
        asyncio.run(muster(arguments.name, arguments.config))
    else:
        hivemind_peer(arguments.config)


if __name__ == "__main__":
    main()
