"""kernels.c, built for this very processor: found, compiled and called.

The build takes a second or two, needs a C compiler (`cc`, gcc or clang) and no headers but libc's,
is tried out in a process of its own, and is kept under a name that hashes source, flags, compiler
and processor. A machine without a compiler trains through torch's own operations; `find_kernels`
says why. Kernels run on the threads of the OpenMP pool that torch has loaded: its entry points are
handed over as pointers, because a second pool would fight with it for the cores.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protos.contract.errors import MachineError

SOURCE = Path(__file__).with_name("kernels.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = (
    *("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-fno-math-errno"),
    *("-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
    *(("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()),
)
MAX_POSITIONS = 8192
"""Longest sequence; MUSTER_MAX_POSITIONS of the source."""
_BUILD_SECONDS = 60.0
_PYTHON_ERROR = 1
_DEFINES: dict[torch.dtype, tuple[str, ...]] = {
    torch.bfloat16: (),
    torch.float32: ("-DMUSTER_FP32",),
}

Argument = Tensor | float | int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltKernels:
    """The two libraries, or why there are none."""

    by_dtype: dict[torch.dtype, ctypes.CDLL]
    reason: str
    key: str = ""
    """Hash of everything that the libraries were made from; empty if there are none."""

    def __bool__(self) -> bool:
        return bool(self.by_dtype)


def find_kernels(cache_dir: Path | None) -> BuiltKernels:
    """Kernels from the cache, or built now and kept there; if neither can be, the reason.

    Nothing is kept with `cache_dir` None; nobody else may be able to write there. Safe beside
    others that build into the same directory: a library appears there whole or not at all.
    """
    compilers = _compilers()
    if not compilers:
        return _none(f"there is no C compiler ({', '.join(COMPILERS)}) on the PATH")
    try:
        key_by_compiler = {compiler: _key(compiler) for compiler in compilers}
        pool = _torch_pool()
    except OSError as error:
        return _none(f"this system does not show its processor or libraries ({error})")
    if pool is None and torch.get_num_threads() > 1:
        return _none("torch has no GNU OpenMP pool whose threads they could use")
    notes: list[str] = []
    by_dtype = _load_kept(cache_dir, key_by_compiler, notes)
    if by_dtype is None:
        by_dtype = _build(cache_dir, key_by_compiler, notes)
    if by_dtype is None:
        return _none("the kernels cannot be built: " + "; ".join(notes))
    if pool is not None:
        for library in by_dtype.values():
            library.muster_use_pool(*(ctypes.cast(entry, ctypes.c_void_p) for entry in pool))
    key = hashlib.sha256("".join(sorted(key_by_compiler.values())).encode()).hexdigest()
    return BuiltKernels(by_dtype=by_dtype, reason="; ".join(["built here", *notes]), key=key)


def _none(reason: str) -> BuiltKernels:
    return BuiltKernels(by_dtype={}, reason=reason)


def _compilers() -> list[str]:
    """Those on the PATH, each once under whichever name."""
    found: dict[str, str] = {}
    for name in COMPILERS:
        path = shutil.which(name)
        if path is not None:
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def _key(compiler: str) -> str:
    key = hashlib.sha256(SOURCE.read_bytes())
    modified = str(Path(compiler).stat().st_mtime_ns)
    for part in (*FLAGS, os.path.realpath(compiler), modified, _processor()):
        key.update(part.encode() + b"\0")
    return key.hexdigest()[:32]


def _file_names(key: str) -> dict[torch.dtype, str]:
    return {dtype: f"{key}-{str(dtype).removeprefix('torch.')}.so" for dtype in _DEFINES}


def _load_kept(
    cache_dir: Path | None, key_by_compiler: dict[str, str], notes: list[str]
) -> dict[torch.dtype, ctypes.CDLL] | None:
    """What an earlier start has kept, whichever compiler made it. A directory that nothing can be
    run from is noted and not used.
    """
    if cache_dir is None:
        return None
    for key in key_by_compiler.values():
        path_by_dtype = {dtype: cache_dir / name for dtype, name in _file_names(key).items()}
        if not all(path.exists() for path in path_by_dtype.values()):
            continue
        try:
            return {dtype: ctypes.CDLL(str(path)) for dtype, path in path_by_dtype.items()}
        except OSError as error:
            notes.append(f"built at every start, because what is kept cannot be loaded: {error}")
    return None


def _build(
    cache_dir: Path | None, key_by_compiler: dict[str, str], notes: list[str]
) -> dict[torch.dtype, ctypes.CDLL] | None:
    """Build with the first compiler that can, in a directory that is removed after loading: the
    system's for such things, else one in the cache, because either may forbid to run what lies
    there.
    """
    parents = [None] if cache_dir is None else [None, cache_dir]
    for compiler, key in key_by_compiler.items():
        for parent in parents:
            try:
                if parent is not None:
                    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(prefix="kernels-", dir=parent) as name:
                    path_by_dtype = _compile(compiler, Path(name), key)
                    by_dtype = {d: ctypes.CDLL(str(path)) for d, path in path_by_dtype.items()}
                    _keep(list(path_by_dtype.values()), cache_dir, notes)
                    return by_dtype
            except MachineError as error:  # another directory does not help
                notes.append(str(error))
                break
            except (OSError, subprocess.SubprocessError) as error:
                notes.append(f"{compiler} in {parent or tempfile.gettempdir()}: {error}")
    return None


def _compile(compiler: str, directory: Path, key: str) -> dict[torch.dtype, Path]:
    """Both libraries at once, each tried out in a process of its own. Raises MachineError."""
    path_by_dtype, running = {}, []
    for dtype, file_name in _file_names(key).items():
        path = path_by_dtype[dtype] = directory / file_name
        command = [compiler, *FLAGS, *_DEFINES[dtype], str(SOURCE), "-o", str(path), "-lm"]
        running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    try:
        for process in running:
            _, errors = process.communicate(timeout=_BUILD_SECONDS)
            if process.returncode != 0:
                last = errors.decode(errors="replace").strip().splitlines()[-1:]
                raise MachineError(f"{compiler} ended with {process.returncode}: {''.join(last)}")
    finally:
        for process in running:
            process.kill()
            process.wait()
    for path in path_by_dtype.values():
        _try_out(path)
    return path_by_dtype


def _try_out(path: Path) -> None:
    """Call every loop of a library once, where an instruction that this processor lacks ends only a
    child. Raises MachineError, or OSError if nothing can be run from that directory.
    """
    program = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).muster_check())"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, str(path)],
        capture_output=True,
        timeout=_BUILD_SECONDS,
        check=False,
    )
    if done.returncode < 0:
        raise MachineError(f"what was built dies of {signal.Signals(-done.returncode).name}")
    if done.returncode == _PYTHON_ERROR:
        ctypes.CDLL(str(path))  # raises what the child has met
    if done.returncode != 0:
        raise MachineError(f"what was built gives wrong numbers (check {done.returncode})")


def _keep(paths: list[Path], cache_dir: Path | None, notes: list[str]) -> None:
    """Copy into the cache, each whole or not at all; what is in the way is noted."""
    if cache_dir is None:
        return
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in paths:
            with tempfile.NamedTemporaryFile(dir=cache_dir, suffix=".tmp", delete=False) as file:
                try:
                    file.write(path.read_bytes())
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(file.name, cache_dir / path.name)
                except BaseException:
                    os.unlink(file.name)
                    raise
    except OSError as error:
        notes.append(f"not kept: {error}")


def _processor() -> str:
    """What -march=native looks at."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines if line.startswith(names))


def _torch_pool() -> tuple[Any, ...] | None:
    """Entry points of the OpenMP library that torch has loaded."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if "libgomp" in line}
    torch_root = str(Path(torch.__file__).parent.parent)
    for path in sorted(paths, key=lambda path: not path.startswith(torch_root)):
        library = ctypes.CDLL(path)
        return library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads
    return None


class Kernels:
    """Calls of one library, for products in one dtype; tensors must be contiguous."""

    def __init__(self, built: BuiltKernels, dtype: torch.dtype) -> None:
        self._library = built.by_dtype[dtype]
        self.dtype = dtype
        self._function_by_name: dict[str, Callable[..., int]] = {}

    def __call__(self, name: str, *arguments: Argument) -> None:
        """Run muster_<name> with these arguments and the number of threads behind them."""
        function = self._function_by_name.get(name)
        if function is None:
            function = self._function_by_name[name] = self._typed(name, arguments)
        plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        function(*plain, torch.get_num_threads())

    def _typed(self, name: str, arguments: tuple[Argument, ...]) -> Callable[..., int]:
        function = self._library[f"muster_{name}"]
        function.restype = None
        kinds = [
            ctypes.c_float
            if isinstance(argument, float)
            else ctypes.c_int64
            if isinstance(argument, int)
            else ctypes.c_void_p
            for argument in arguments
        ]
        function.argtypes = [*kinds, ctypes.c_int64]
        return function
