"""This deployment of the coordinator: addresses, directories, intervals. What the run *is* stands
in its RunSpec.

Order, later wins: defaults < TOML file < environment `MUSTER_COORDINATOR_<FIELD>` < flags. Unknown
keys are refused with the nearest match, in files and in the environment alike. This is the only
coordinator module that reads the environment.
"""

import dataclasses
import difflib
import importlib.metadata
import ipaddress
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protos.contract.errors import ErrorCode, MachineError, UsageError

ENVIRONMENT_PREFIX = "MUSTER_COORDINATOR_"
CONFIG_FILE_VARIABLE = "MUSTER_COORDINATOR_CONFIG"
"""Names a TOML file when no --config is given."""
_MULTIADDRESS = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/[^/\s]+/(tcp|udp)/[0-9]+(/[^/\s]+)*/p2p/\w+")
"""Of another process: where it is and, after /p2p/, who it must be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorConfig:
    """Settings of one coordinator process; immutable, checked when made."""

    data_dir: Path = Path("muster-data")
    """Everything that must survive: store, keys, datasets, checkpoints."""
    host: str = "0.0.0.0"
    """Interface on which peers reach the coordinator."""
    port: int = 7700
    """Port for peers; 0 lets the system choose."""
    advertise: str = ""
    """HOST:PORT that join strings name; empty: the host's own name or address with the real port.
    """
    http_host: str = "127.0.0.1"
    """Interface of the page, the JSON API and /metrics. They carry no secrets, but also no login.
    """
    http_port: int = 7701
    """Port of the page; 0 lets the system choose."""
    rendezvous: tuple[str, ...] = ()
    """Multiaddresses of rendezvous that run elsewhere; empty: one is started as a child process."""
    rendezvous_host: str = ""
    """Interface of the child rendezvous; empty: the same as `host`."""
    rendezvous_port: int = 7702
    """Port of the child rendezvous; 0 lets the system choose."""
    has_rendezvous: bool = True
    """False: start none and name none (peers then find each other only through one another)."""
    checkpoint_mirrors: tuple[str, ...] = ()
    """Where copies of DATA_DIR/checkpoints lie, as http, https or file addresses: peers take a
    run's newest from MIRROR/RUN_ID when nobody else serves it.
    """
    heartbeat_interval_seconds: float = 10.0
    """What heartbeat replies ask for, before jitter."""
    lease_ttl_seconds: float = 60.0
    """A lease that is not renewed for this long may be expired."""
    recovering_seconds: float = 30.0
    """Least time after a start during which nothing expires; three heartbeats if that is longer."""
    start_grace_seconds: float = 20.0
    """A new run waits this long for its `min_peers` before it starts with those that are there."""
    quorum_grace_seconds: float = 60.0
    """Silent voters are waited for this long before a new incarnation leaves them behind."""
    settle_seconds: float = 15.0
    """A rollback waits this long after a join for the joiner to say which state it holds."""
    session_seconds: float = 86_400.0
    """Life of a session key; peers join again before it ends."""
    checkpoint_interval_seconds: float = 60.0
    """How often a member is asked to upload the newest state."""
    num_evaluations: int = 8
    """Held-out evaluations over the budget, evenly by credited tokens."""
    duty_ttl_seconds: float = 120.0
    """A duty whose holder has not said for this long that it works on it goes to somebody else."""
    num_kept_checkpoints: int = 3
    """Newest checkpoints that stay on disk, per run."""
    max_peers: int = 4096
    """Most members of a run."""
    max_concurrent_rpcs: int = 2048
    """Calls in progress; more are refused with RESOURCE_EXHAUSTED."""
    peer_calls_per_second: float = 50.0
    """Sustained calls of one peer; bursts may be four times as many."""
    join_calls_per_second: float = 20.0
    """Sustained unauthenticated calls of one address; bursts may be ten times as many."""
    stop_deadline_seconds: float = 5.0
    """Calls in progress at a stop get this long."""

    def __post_init__(self) -> None:
        for name in ("port", "http_port", "rendezvous_port"):
            if not 0 <= getattr(self, name) <= 65_535:
                raise _refused(name, getattr(self, name), "a port from 0 to 65535")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is float and not (math.isfinite(value) and value > 0):
                raise _refused(field.name, value, "a positive number")
        for address in self.rendezvous:
            if not _MULTIADDRESS.fullmatch(address):
                raise _refused(
                    "rendezvous",
                    address,
                    "multiaddresses such as /ip4/192.0.2.7/tcp/7702/p2p/Qm...",
                )
        self._check_rendezvous_host()
        for mirror in self.checkpoint_mirrors:
            if not mirror.startswith(("http://", "https://", "file:///")) or len(mirror) > 500:
                raise _refused(
                    "checkpoint_mirrors", mirror, "http://, https:// or file:/// addresses"
                )
        for name in ("num_evaluations", "num_kept_checkpoints", "max_peers", "max_concurrent_rpcs"):
            if getattr(self, name) < 1:
                raise _refused(name, getattr(self, name), "at least 1")
        if self.lease_ttl_seconds < 2 * self.heartbeat_interval_seconds:
            raise _refused(
                "lease_ttl_seconds",
                self.lease_ttl_seconds,
                f"at least two heartbeats ({2 * self.heartbeat_interval_seconds:g} s)",
            )

    def _check_rendezvous_host(self) -> None:
        """libp2p wants an address to listen at, not a name."""
        name = "rendezvous_host" if self.rendezvous_host else "host"
        if self.has_rendezvous and not self.rendezvous:
            try:
                ipaddress.IPv4Address(getattr(self, name))
            except ValueError as error:
                allowed = (
                    "an IPv4 address of this machine, 0.0.0.0 for all: a rendezvous is started"
                )
                raise _refused(name, getattr(self, name), allowed) from error


def load_config(
    *,
    config_path: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> CoordinatorConfig:
    """Merge the four sources. `flags` whose value is None were not given. Raises UsageError or
    MachineError.
    """
    variables = os.environ if environment is None else environment
    if config_path is None and variables.get(CONFIG_FILE_VARIABLE):
        config_path = Path(variables[CONFIG_FILE_VARIABLE])
    values: dict[str, Any] = {}
    if config_path is not None:
        plain = _read_toml(config_path)
        _refuse_unknown(plain, origin=f"{config_path}")
        values.update({name: _from_toml(name, value) for name, value in plain.items()})
    from_variables = {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): text
        for name, text in variables.items()
        if name.startswith(ENVIRONMENT_PREFIX) and name != CONFIG_FILE_VARIABLE
    }
    _refuse_unknown(from_variables, origin=f"environment {ENVIRONMENT_PREFIX}*")
    values.update({name: _from_text(name, text) for name, text in from_variables.items()})
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    _refuse_unknown(given, origin="flags")
    values.update(given)
    return CoordinatorConfig(**values)


def package_version() -> str:
    """Version of the installed package; "source" when run from a checkout."""
    try:
        return importlib.metadata.version("muster")
    except importlib.metadata.PackageNotFoundError:
        return "source"


_FIELD_TYPES: dict[str, Any] = {
    field.name: field.type for field in dataclasses.fields(CoordinatorConfig)
}


def _refused(name: str, value: object, allowed: str) -> UsageError:
    return UsageError(f"{name} = {value!r}", allowed=allowed, remedy=f"change {name}")


def _refuse_unknown(names: Iterable[str], *, origin: str) -> None:
    for name in names:
        if name in _FIELD_TYPES:
            continue
        near = difflib.get_close_matches(name, _FIELD_TYPES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "remove it"
        raise UsageError(
            f"unknown key {name!r} in {origin}", allowed=", ".join(_FIELD_TYPES), remedy=hint
        )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} is not TOML: {error}",
            allowed="key = value lines in UTF-8",
            remedy="correct it",
        ) from error
    except OSError as error:
        raise MachineError(
            f"cannot read {path}: {error.strerror}",
            allowed="a readable TOML file",
            remedy="check the path and its permissions",
            code=ErrorCode.PERMISSION_DENIED,
        ) from error


def _from_toml(name: str, value: object) -> Any:
    kind = _FIELD_TYPES[name]
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (int, bool, str) and type(value) is kind:
        return value
    if (
        isinstance(value, list)
        and all(isinstance(item, str) for item in value)
        and kind == tuple[str, ...]
    ):
        return tuple(value)
    raise _refused(name, value, f"a value of type {_type_name(kind)}")


def _from_text(name: str, text: str) -> Any:
    kind = _FIELD_TYPES[name]
    try:
        if kind is bool:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        if kind in (int, float, str, Path):
            return kind(text)
    except (ValueError, KeyError) as error:
        raise _refused(
            ENVIRONMENT_PREFIX + name.upper(), text, f"a value of type {_type_name(kind)}"
        ) from error
    return tuple(part for part in text.split(",") if part)


def _type_name(kind: Any) -> str:
    return {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}.get(
        kind, "list of texts"
    )
