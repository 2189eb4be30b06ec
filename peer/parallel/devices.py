"""This machine's device for the trainer: which one, how much memory, and the settings that make it
fast.

CPU settings. glibc gives freed blocks above a threshold back to the kernel and faults them in
again; a decoder's logits and scores are such blocks in every micro-batch. Keeping them costs no
more than the peak and was worth 13-25 % of a training step (2 M parameters, one thread, 4 and 8
sequences of 256).
"""

import ctypes
import os
from dataclasses import dataclass

import torch

from protos.contract.errors import MachineError

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEEP_BYTES = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """What there is to train on."""

    device: str
    """As torch names it."""
    name: str
    total_memory_bytes: int
    num_threads: int


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next micro-batch; True if it took the setting.

    Call before torch works.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES) and mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES))


def choose_device(wanted: str) -> torch.device:
    """Device for "auto", "cpu", "cuda" or "cuda:N". Raises MachineError if it cannot be had."""
    if wanted in ("", "auto"):
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and not (
        torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    ):
        raise MachineError(
            f"device {wanted!r}, {torch.cuda.device_count()} CUDA devices usable by "
            f"torch {torch.__version__}",
            allowed="cpu, or a CUDA device that torch sees",
            remedy="choose device cpu, or install a CUDA build of torch and its driver",
        )
    return device


def describe_device(device: torch.device, *, num_threads: int) -> DeviceInfo:
    """Name and memory of a device."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, total_memory_bytes = properties.name, properties.total_memory
    else:
        name = torch.backends.cpu.get_cpu_capability()
        total_memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return DeviceInfo(
        device=str(device),
        name=name,
        total_memory_bytes=total_memory_bytes,
        num_threads=num_threads,
    )


def available_memory_bytes(device: torch.device) -> int:
    """Memory that can still be taken."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
