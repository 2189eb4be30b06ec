"""PeerConfig: what this machine is and what its owner allows; nothing of the run (RunSpec) lives
here.

Sources, later ones win: defaults < TOML file (`--config`, MUSTER_PEER_CONFIG or HOME/peer.toml) <
environment variables MUSTER_PEER_<KEY> < flags. Keys are the same everywhere; an unknown one is
refused with the nearest match. This is the only module of the peer that reads the environment.
"""

import difflib
import os
import re
import socket
import stat
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from protos.contract.addresses import ALLOWED_ADDRESS, problem_of_address
from protos.contract.errors import ErrorCode, MachineError, UsageError
from protos.contract.ids import is_valid_name

ENVIRONMENT_PREFIX = "MUSTER_PEER_"
_FILE_VARIABLE = f"{ENVIRONMENT_PREFIX}CONFIG"
_UNIT_BYTES = {
    "": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_SIZE_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
EXECUTIONS = ("auto", "eager", "native", "compiled")
EXECUTIONS_OF_RANKS = ("auto", "eager")
"""Where a model lies on several devices."""
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def parse_bytes(text: str | int) -> int:
    """Read a size such as "8GiB", "500MB" or 1048576. Raises UsageError."""
    match = _SIZE_PATTERN.fullmatch(str(text))
    unit = match.group(2).lower() if match else ""
    if match is None or unit not in _UNIT_BYTES:
        raise UsageError(
            f"size {str(text)!r} is not a number with a unit",
            allowed="a number followed by B, KiB, MiB, GiB, TiB, kB, MB, GB or TB",
            remedy="write for example 8GiB",
        )
    return int(float(match.group(1)) * _UNIT_BYTES[unit])


def format_bytes(num_bytes: float) -> str:
    """Size for people: "1.5 GiB"."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(num_bytes) >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def default_home() -> Path:
    """Directory that a peer uses when nobody names one."""
    return Path.home() / ".local" / "share" / "muster"


MAX_THREADS = 4096
"""Tens of thousands end torch with a segmentation fault."""


def num_physical_cores(topology: Path = Path("/sys/devices/system/cpu")) -> int:
    """Cores that this process may use, hardware threads of one core counted once: a second one
    adds nothing to matrix products. All logical ones where the system does not tell.
    """
    logical = os.sched_getaffinity(0)
    cores = set()
    for number in logical:
        siblings = topology / f"cpu{number}" / "topology" / "thread_siblings_list"
        try:
            cores.add(siblings.read_text(encoding="ascii").strip())
        except OSError:
            return max(1, len(logical))
    return max(1, len(cores))


def _default_name() -> str:
    cleaned = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).strip("-._")[:40]
    return cleaned if is_valid_name(cleaned) else "peer"


def _parse_whole(text: str | int) -> int:
    if isinstance(text, bool):
        raise ValueError("a truth value is not a number")
    return int(text)


def _parse_limit(text: str | int) -> int | None:
    if str(text).strip().lower() in ("", "none", "0"):
        return None
    return parse_bytes(text)


def _parse_list(text: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    parts = text.split(",") if isinstance(text, str) else list(text)
    return tuple(part.strip() for part in parts if part.strip())


def _parse_path(text: str | Path) -> Path:
    return Path(text).expanduser().absolute()


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerConfig:
    """This machine."""

    name: str = field(default_factory=_default_name)
    """Name for people; the identity is the key under `home`."""
    home: Path = field(default_factory=default_home)
    """Identity, cache, local checkpoints and logs; locked while a peer runs."""
    threads: int = field(default_factory=num_physical_cores)
    """CPU threads that training may use; one per physical core that this process may run on."""
    memory_limit_bytes: int | None = None
    """Memory of all processes together above which the peer stops training; None: no limit of its
    own.
    """
    disk_limit_bytes: int | None = 10 * 2**30
    """Space for cached chunks and local checkpoints; None: no limit of its own."""
    upload_limit_mbit: float = 0.0
    """Megabits per second that rounds may send; 0: no limit."""
    listen_host: str = "0.0.0.0"
    """Address at which other peers may connect."""
    listen_port: int = 0
    """TCP port for other peers; 0 lets the system choose."""
    announce: tuple[str, ...] = ()
    """libp2p multiaddresses at which others reach this peer, when they differ from what it listens
    on.
    """
    metrics_port: int | None = None
    """Loopback port of /metrics; 0 lets the system choose; None: no server."""
    device: str = "auto"
    """Where to train: auto, cpu or cuda."""
    execution: str = "auto"
    """What runs the training step: auto (measured), eager (torch), native (kernels built here),
    compiled (torch.compile: slow to start).
    """
    shared_step_cache: Path | None = None
    """Where the training step keeps kernels and plans, which peers of one machine and owner may
    share; None: under `home`.
    """
    devices: str = ""
    """Several devices: cpu:N, N shares of the CPU, or cuda:0,1; empty: what `device` says."""
    layout: str = "auto"
    """How a model lies on them: auto, or such as tp=2,pp=2 (peer/parallel/layout.py)."""
    probe_interval_seconds: float = 0.0
    """How often a micro-batch's activations and gradients are measured per layer, for /metrics; 0:
    never.
    """
    log_level: str = "INFO"
    """Least severe log line that is written."""

    def __post_init__(self) -> None:
        """Refuse what cannot work, with found / allowed / remedy."""
        if not is_valid_name(self.name):
            raise UsageError(
                f"name {self.name!r} is not a valid name",
                allowed="1 to 40 letters, digits, spaces, dots, hyphens, underscores; first a "
                "letter or digit",
                remedy="choose another with --name",
            )
        _check_range("threads", self.threads, 1, MAX_THREADS)
        _check_range("listen_port", self.listen_port, 0, 65535)
        if self.metrics_port is not None:
            _check_range("metrics_port", self.metrics_port, 0, 65535)
        _check_range("probe_interval_seconds", self.probe_interval_seconds, 0, 1_000_000)
        _check_range("upload_limit_mbit", self.upload_limit_mbit, 0, 1_000_000)
        for address in self.announce:
            check_announced(address)
        if self.log_level not in LOG_LEVELS:
            raise _not_one_of("log_level", self.log_level, LOG_LEVELS)
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", self.device):
            raise _not_one_of("device", self.device, ("auto", "cpu", "cuda", "cuda:N"))
        if self.execution not in EXECUTIONS:
            raise _not_one_of("execution", self.execution, EXECUTIONS)
        if not re.fullmatch(r"|auto|cpu(:[1-9][0-9]{0,2})?|cuda(:[0-9]+(,[0-9]+)*)?", self.devices):
            raise _not_one_of("devices", self.devices, ("auto", "cpu:N", "cuda:0,1"))
        numbers = self.devices.partition(":")[2].split(",")
        if len(set(map(int, filter(None, numbers)))) < len(list(filter(None, numbers))):
            raise UsageError(
                f"devices is {self.devices!r}",
                allowed="each device once",
                remedy="name each GPU once; cpu:N are shares of one CPU",
            )
        if self.devices and self.device != "auto":
            raise UsageError(
                f"device {self.device} and devices {self.devices}",
                allowed="one of them",
                remedy="leave --device out",
            )

    @property
    def step_cache(self) -> Path:
        """What the training step keeps: kernels, plans, compiled code."""
        return self.shared_step_cache or self.home / "step"


def problem_of_cache(directory: Path) -> str:
    """Why nothing is loaded from this directory or kept there: others could put code into it; ""
    if nobody can, or if it is not there yet.
    """
    try:
        found = directory.stat()
    except FileNotFoundError:
        return ""
    except OSError as error:
        return str(error)
    if not stat.S_ISDIR(found.st_mode):
        return f"{directory} is not a directory"
    if found.st_uid == os.geteuid() and not found.st_mode & 0o022:
        return ""
    return f"{directory} belongs to, or may be written by, others"


def check_announced(address: str) -> None:
    """Raise UsageError unless others can dial this address."""
    if problem := problem_of_address(address):
        raise UsageError(
            f"announce is {address!r}: {problem}",
            allowed=ALLOWED_ADDRESS,
            remedy="correct announce in the flag, variable or file that sets it",
        )


def _check_range(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UsageError(
            f"{key} is {value}",
            allowed=f"{low} to {high}",
            remedy=f"correct {key} in the flag, variable or file that sets it",
        )


def _not_one_of(key: str, value: str, allowed: tuple[str, ...]) -> UsageError:
    return UsageError(
        f"{key} is {value!r}", allowed=", ".join(allowed), remedy=f"choose one of them for {key}"
    )


@dataclass(frozen=True, slots=True)
class _Key:
    """One user-facing key: which field it sets and how its text is read."""

    field_name: str
    parse: Callable[[Any], Any]


_KEYS: dict[str, _Key] = {
    "name": _Key("name", str),
    "home": _Key("home", _parse_path),
    "threads": _Key("threads", _parse_whole),
    "memory_limit": _Key("memory_limit_bytes", _parse_limit),
    "disk_limit": _Key("disk_limit_bytes", _parse_limit),
    "upload_limit_mbit": _Key("upload_limit_mbit", float),
    "listen_host": _Key("listen_host", str),
    "listen_port": _Key("listen_port", _parse_whole),
    "announce": _Key("announce", _parse_list),
    "metrics_port": _Key("metrics_port", _parse_whole),
    "device": _Key("device", str),
    "execution": _Key("execution", str),
    "step_cache": _Key("shared_step_cache", _parse_path),
    "devices": _Key("devices", str),
    "layout": _Key("layout", str),
    "probe_interval_seconds": _Key("probe_interval_seconds", float),
    "log_level": _Key("log_level", lambda text: str(text).upper()),
}


def _unknown(key: str, *, source: str, known: list[str]) -> UsageError:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "remove it"
    return UsageError(
        f"unknown key {key!r} in {source}", allowed=", ".join(sorted(known)), remedy=hint
    )


def _parse_source(values: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for key, value in values.items():
        known = _KEYS.get(key)
        if known is None:
            raise _unknown(key, source=source, known=list(_KEYS))
        try:
            parsed[known.field_name] = known.parse(value)
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"{key} in {source} is {value!r}: {error}",
                allowed=f"what {key} means: a value of type {_type_name(known.field_name)}",
                remedy=f"correct {key} in {source}",
            ) from error
    return parsed


def _type_name(field_name: str) -> str:
    by_name = {entry.name: entry.type for entry in fields(PeerConfig)}
    kind = by_name[field_name]
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _read_file(path: Path, *, may_be_missing: bool = False) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        if may_be_missing:
            return {}
        raise _unreadable(path, error) from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f"{path} is not TOML: {error}", allowed="key = value lines", remedy="correct that line"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError | UnicodeDecodeError) -> MachineError:
    why = (error.strerror if isinstance(error, OSError) else None) or error
    return MachineError(
        f"cannot read {path}: {why}",
        allowed="a UTF-8 file that this user may read",
        remedy="check --config, --home and their permissions",
        code=ErrorCode.PERMISSION_DENIED,
    )


def _read_environment(environment: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    known = [f"{ENVIRONMENT_PREFIX}{key.upper()}" for key in _KEYS] + [_FILE_VARIABLE]
    for variable, value in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable == _FILE_VARIABLE:
            continue
        if variable not in known:
            raise _unknown(variable, source="the environment", known=known)
        found[variable.removeprefix(ENVIRONMENT_PREFIX).lower()] = value
    return found


def load_config(
    *,
    flags: Mapping[str, Any],
    config_path: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> PeerConfig:
    """Merge defaults, file, environment and flags (flags that are None were not given). Raises
    UsageError.
    """
    environment = os.environ if environment is None else environment
    from_flags = _parse_source(
        {key: value for key, value in flags.items() if value is not None}, source="the flags"
    )
    from_environment = _parse_source(_read_environment(environment), source="the environment")
    if config_path is None and _FILE_VARIABLE in environment:
        config_path = Path(environment[_FILE_VARIABLE])
    if config_path is None:
        home = from_flags.get("home") or from_environment.get("home") or default_home()
        config_path = home / "peer.toml"
        from_file = _read_file(config_path, may_be_missing=True)
    else:
        from_file = _read_file(config_path)
    parsed_file = _parse_source(from_file, source=str(config_path))
    return PeerConfig(**(parsed_file | from_environment | from_flags))


_PASSIVE_WAIT = ("OMP_WAIT_POLICY", "PASSIVE")
"""Waiting threads sleep: on a busy machine two spinning ones trained 9 times slower (measured)."""


def child_environment(config: PeerConfig) -> dict[str, str]:
    """Environment of the swarm and trainer processes: ours, with thread counts that libraries read
    at import.
    """
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(ENVIRONMENT_PREFIX)
    }
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[variable] = str(config.threads)
    environment["HIVEMIND_LOGLEVEL"] = "INFO" if config.log_level == "DEBUG" else "WARNING"
    environment["PYTHONUNBUFFERED"] = "1"
    cache = config.home if problem_of_cache(config.step_cache) else config.step_cache
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # local ranks talk on this machine only
    environment.setdefault(*_PASSIVE_WAIT)
    return environment


def mark_descendants(mark: Mapping[str, str]) -> None:
    """Put a mark (home.py) into the environment of whatever this process starts."""
    os.environ.update(mark)


def quiet_libraries() -> None:
    """Keep gRPC's own lines off the terminal, and OpenMP from spinning; both are read at import."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault(*_PASSIVE_WAIT)
