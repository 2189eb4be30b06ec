"""This machine's device for the trainer: which one, how much memory, and the settings that make it
fast.

CPU settings. glibc gives freed blocks above a threshold back to the kernel and faults them in
again; a decoder's logits and scores are such blocks in every micro-batch. Keeping them costs no
more than the peak and was worth 13-25 % of a training step (2 M parameters, one thread, 4 and 8
sequences of 256).
"""

import ctypes
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from peer.parallel.machine_memory import host_memory_bytes
from protos.contract.errors import MachineError

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEEP_BYTES = 2**30
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_LOST_WORDS = (
    "uncorrectable",  # ECC, NVLink
    "unspecified launch failure",
    "busy or unavailable",
    "no CUDA-capable device",
    "GPU is lost",
    "fallen off the bus",
)
"""Of CUDA's and NVML's messages (cudaGetErrorString) for a device that is of no use any more."""


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
    if device.type != "cuda":
        return device
    problem, num_devices = why_no_cuda(), torch.cuda.device_count()
    if not problem and (device.index or 0) >= num_devices:
        problem = f"there are {num_devices}, counted from 0"
    if problem:
        remedy = "install a CUDA build of torch and an NVIDIA driver"
        if "too old" in problem:
            remedy = (
                "update the NVIDIA driver, or install a build of torch for the one that is here"
            )
        raise MachineError(
            f"device {wanted!r}, {num_devices} CUDA devices usable by torch {torch.__version__}: "
            f"{problem}",
            allowed="cpu, or a CUDA device that torch sees",
            remedy=f"choose device cpu, or {remedy}",
        )
    return device


def why_no_cuda() -> str:
    """Why torch can use no CUDA device, in its own words, which name the version of a driver that
    is too old; empty if it can.
    """
    if torch.cuda.is_available():
        return ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).split("\n")[0]
    return "torch finds no device"


def unused_gpu_note() -> str:
    """What an owner must know who leaves the choice to us and has a GPU that torch cannot use;
    empty otherwise.
    """
    if not _NVIDIA_DRIVER.exists() or not (problem := why_no_cuda()):
        return ""
    return f"the NVIDIA device here is not used ({problem}): "


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
    return host_memory_bytes()


def measure_flop_per_second(
    device: torch.device, *, num_rows: int = 768, dtype: torch.dtype | None = None
) -> float:
    """Speed of a matrix product, by default in fp32 on CPU, in bf16 elsewhere; takes some
    hundredths of a second.
    """
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    matrix = torch.ones((num_rows, num_rows), device=device, dtype=dtype)
    seconds = float("inf")
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        seconds = min(seconds, time.perf_counter() - begin)
    return 2 * num_rows**3 / max(seconds, 1e-9)


def is_out_of_memory(error: BaseException | None) -> bool:
    """True for torch's and Python's ways to say so, also as the cause of another error."""
    if error is None:
        return False
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("not enough memory", "can't allocate memory")  # torch on CPU: Windows, Linux
    if isinstance(error, RuntimeError) and any(word in str(error) for word in words):
        return True
    return is_out_of_memory(error.__cause__)


def is_device_lost(error: BaseException | None) -> bool:
    """True if an accelerator is gone or broken, also as the cause of another error."""
    if error is None:
        return False
    if isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST_WORDS):
        return True
    return is_device_lost(error.__cause__)
