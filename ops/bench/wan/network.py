"""Hosts on a wide-area network that exists on this machine only: network namespaces joined by
switch.c, each with a rate, a delay, loss and a queue of its own.

Needs root, iproute2 and a C compiler; nothing leaves the machine, and everything is removed again.
A kernel without netem is enough.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SOURCE = Path(__file__).resolve().parent / "switch.c"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wan:
    """Links of all hosts."""

    rates_mbit: tuple[float, ...]
    """Upload of each host."""
    download_mbit: float | None = None
    """Of every host; None: as its upload. Up and down do not share."""
    rtt_ms: float
    loss_percent: float = 0.0
    """Of the frames in each direction."""
    queue_ms: float = 300.0
    sysctls: tuple[tuple[str, str], ...] = ()
    """Set in every host, such as ("net.ipv4.tcp_congestion_control", "bbr")."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One host: where it is, and what to put before a command that runs on it."""

    address: str
    prefix: tuple[str, ...]


def problem() -> str:
    """Why no network can be made here; empty if it can."""
    missing = [tool for tool in ("ip", "cc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found; install iproute2 and a C compiler"
    if os.geteuid() != 0:
        return f"user {os.geteuid()} may not make network namespaces; run as root"
    if not Path("/dev/net/tun").exists():
        return "/dev/net/tun does not exist; load the kernel module tun"
    return ""


@contextlib.contextmanager
def network(wan: Wan) -> Iterator[list[Host]]:
    """Hosts with these links, for as long as the block runs."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    tag = f"mu{os.getpid() % 10000}x"
    names = [f"{tag}{index}" for index in range(len(wan.rates_mbit))]
    with tempfile.TemporaryDirectory(prefix="muster-wan") as folder:
        program = Path(folder) / "switch"
        subprocess.run(["cc", "-O2", "-o", str(program), str(_SOURCE)], check=True)
        rates = [f"{rate:g}:{wan.download_mbit or rate:g}" for rate in wan.rates_mbit]
        numbers = [f"{number:g}" for number in (wan.rtt_ms / 2, wan.loss_percent, wan.queue_ms)]
        switch = subprocess.Popen(
            [str(program), tag, *numbers, *rates],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert switch.stdout is not None
            if switch.stdout.readline().strip() != "ready":
                raise RuntimeError("the switch did not start")
            os.sched_setscheduler(
                switch.pid, os.SCHED_RR, os.sched_param(1)
            )  # a wire does not wait
            yield [_add_host(name, index, wan) for index, name in enumerate(names)]
        finally:
            switch.send_signal(signal.SIGTERM)
            switch.wait(10)
            for name in names:
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _add_host(name: str, index: int, wan: Wan) -> Host:
    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    address = f"10.77.0.{index + 1}"
    ip("netns", "add", name)
    ip("link", "set", name, "netns", name)
    ip("-n", name, "link", "set", "lo", "up")
    ip("-n", name, "link", "set", name, "address", f"02:00:00:00:00:{index:02x}")
    ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
    ip("-n", name, "link", "set", name, "up")
    prefix = ("ip", "netns", "exec", name)
    for key, value in wan.sysctls:
        subprocess.run([*prefix, "sysctl", "-qw", f"{key}={value}"], check=True)
    return Host(address=address, prefix=prefix)


def main() -> int:
    """`network.py RATE_MBIT RTT_MS LOSS_PERCENT NUM_HOSTS`: keep a network until Ctrl+C."""
    rate, rtt, loss, num_hosts = (float(argument) for argument in sys.argv[1:5])
    with network(Wan(rates_mbit=(rate,) * int(num_hosts), rtt_ms=rtt, loss_percent=loss)) as hosts:
        for host in hosts:
            print(host.address, *host.prefix, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
