"""This machine's memory, and what processes take of it before they hold anything. Without torch."""

import os
from pathlib import Path

RUNTIME_BYTES = 400 * 2**20
"""A process with torch, before it holds anything."""
SWARM_RUNTIME_BYTES = 300 * 2**20
"""Daemon and swarm process, before they hold anything."""
MARGIN_RATIO = 0.05
"""Share of a device that is left free."""
_MEMINFO = Path("/proc/meminfo")
_CGROUP_FILES = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def host_memory_bytes() -> int:
    """Main memory that can still be taken: what the kernel could free counts, and the limit of a
    container.
    """
    left_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                left_bytes = int(line.split()[1]) * 1024
    except OSError:
        pass
    for limit, used in _CGROUP_FILES:
        try:
            limit_text = limit.read_text().strip()
            if limit_text.isdecimal():
                left_bytes = min(left_bytes, int(limit_text) - int(used.read_text()))
        except OSError:
            continue
    return max(0, left_bytes)


def max_cpu_shares(memory_bytes: int) -> int:
    """Most shares of the CPU that can each hold a local rank of the smallest model: they divide
    what the swarm leaves of the memory, and every rank is a process.
    """
    usable_bytes = (1 - MARGIN_RATIO) * (memory_bytes - SWARM_RUNTIME_BYTES)
    return max(0, int(usable_bytes // RUNTIME_BYTES))
