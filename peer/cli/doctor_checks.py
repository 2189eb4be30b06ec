"""What `muster-peer doctor` looks at; every check says what it found, what is needed and what to
do.

Nothing is changed: leftovers are only named (the next `join` on the same home clears them). What a
machine cannot know of itself (whether others reach its port) is said to be unknown, not assumed.
"""

import asyncio
import contextlib
import importlib.util
import ipaddress
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from peer.cli.devices import asked_devices, require_devices
from peer.cli.ports import require_free_port
from peer.config import PeerConfig, child_environment, format_bytes, problem_of_cache
from peer.coordinator_client import CLOCK_REFUSE_SECONDS, CLOCK_WARN_SECONDS, CoordinatorClient
from peer.daemon.membership import check_machine, load_membership, package_version
from peer.home import (
    find_leftover_files,
    holder_of_lock,
    load_child_records,
    load_status,
    write_atomically,
)
from peer.parallel.machine_memory import host_memory_bytes
from protos.contract.channel import JoinString
from protos.contract.errors import MachineError, MusterError
from protos.contract.ids import PROTOCOL_VERSION, PeerId

NEEDED_MEMORY_BYTES = 1536 * 2**20
NEEDED_DISK_BYTES = 2**30
PROBE_SECONDS = 120.0
_PROBE_FILE = "probe.json"
_HIVEMIND_VERSION = "1.1.12"
_GOOD_SEND_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the doctor's report."""

    name: str
    is_ok: bool
    found: str
    allowed: str = ""
    remedy: str = ""
    bad_exit_code: int = MachineError.exit_code
    """Exit code of the command, if this is bad and nothing of this machine is."""
    details: dict[str, object] = field(default_factory=dict)
    """Figures behind `found`, for --json."""


def exit_code_of(checks: Sequence[Check]) -> int:
    """What the command ends with: 0, this machine's code, or, where this machine is ready, that of
    what it could not reach.
    """
    codes = [check.bad_exit_code for check in checks if not check.is_ok]
    if MachineError.exit_code in codes:
        return MachineError.exit_code
    return codes[0] if codes else 0


def check_versions() -> Check:
    """Python and the packages that training needs."""
    problems, found = [], [f"muster {package_version()} (protocol {PROTOCOL_VERSION})"]
    found.append("Python " + ".".join(str(part) for part in sys.version_info[:3]))
    for package in ("torch", "hivemind", "numpy", "grpcio", "protobuf"):
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            problems.append(f"{package} is missing")
            continue
        found.append(f"{package} {version}")
        if package == "numpy" and _major_minor(version) >= (2, 4):
            problems.append(f"numpy {version} breaks hivemind")
        if package == "hivemind" and version != _HIVEMIND_VERSION:
            problems.append(f"hivemind {version}")
    return Check(
        name="versions",
        is_ok=not problems,
        found=", ".join(problems or found),
        allowed=f"torch, hivemind {_HIVEMIND_VERSION}, numpy below 2.4",
        remedy="pip install -c ops/constraints.txt '.[peer]' in Muster's folder",
    )


def _major_minor(version: str) -> tuple[int, int]:
    numbers = [int(part) for part in re.findall(r"\d+", version)[:2]]
    return (numbers + [0, 0])[0], (numbers + [0, 0])[1]


def check_home(config: PeerConfig) -> Check:
    """The home can be written; who holds it."""
    existing = config.home
    while not existing.exists():
        existing = existing.parent
    is_writable = os.access(existing, os.W_OK | os.X_OK) and existing.is_dir()
    pid = holder_of_lock(config.home)
    state = f"in use by pid {pid}" if pid is not None else "free"
    return Check(
        name="home",
        is_ok=is_writable,
        found=f"{config.home} ({state})" if is_writable else f"{existing} cannot be written",
        allowed="a directory that this user may write",
        remedy="choose another with --home",
    )


def check_leftovers(config: PeerConfig) -> Check:
    """Processes and files of dead peers on this home."""
    if holder_of_lock(config.home) is not None:
        return Check(name="leftovers", is_ok=True, found="none: a peer is running on this home")
    alive = [record for record in load_child_records(config.home) if record.is_alive]
    files = find_leftover_files(config.home)
    found = [f"{record.name} process {record.pid}" for record in alive]
    found += [str(path.relative_to(config.home)) for path in files[:5]]
    if len(files) > 5:
        found.append(f"and {len(files) - 5} more files")
    return Check(
        name="leftovers",
        is_ok=not found,
        found=", ".join(found) or "none",
        allowed="nothing of a peer that is dead",
        remedy="the next `muster-peer join` on this home clears them",
    )


def check_memory(config: PeerConfig) -> Check:
    """Enough memory for the tiny preset."""
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available_bytes = host_memory_bytes()
    limit_bytes = config.memory_limit_bytes
    usable_bytes = min(available_bytes, limit_bytes or available_bytes)
    limit = f", --memory-limit {format_bytes(limit_bytes)}" if limit_bytes else ""
    return Check(
        name="memory",
        is_ok=usable_bytes >= NEEDED_MEMORY_BYTES,
        found=f"{format_bytes(available_bytes)} free of {format_bytes(total_bytes)}{limit}",
        allowed=f"{format_bytes(NEEDED_MEMORY_BYTES)} for the smallest models",
        remedy="end other programs or raise --memory-limit",
    )


def check_disk(config: PeerConfig) -> Check:
    """Enough room under the home."""
    existing = config.home
    while not existing.exists():
        existing = existing.parent
    free_bytes = shutil.disk_usage(existing).free
    limit_bytes = config.disk_limit_bytes
    usable_bytes = min(free_bytes, limit_bytes or free_bytes)
    limit = f", --disk-limit {format_bytes(limit_bytes)}" if limit_bytes else ""
    return Check(
        name="disk",
        is_ok=usable_bytes >= NEEDED_DISK_BYTES,
        found=f"{format_bytes(free_bytes)} free{limit}",
        allowed=f"{format_bytes(NEEDED_DISK_BYTES)} for chunks and checkpoints",
        remedy="free some space, choose another disk with --home or raise --disk-limit",
    )


def check_port(config: PeerConfig) -> Check:
    """The port for other peers can be opened; whether they reach it cannot be known from here."""
    host, port = config.listen_host, config.listen_port
    if holder_of_lock(config.home) is not None:
        return Check(name="port", is_ok=True, found="not tried: the running peer holds it")
    try:
        require_free_port(host, port)
    except MachineError as error:
        return Check(
            name="port",
            is_ok=False,
            found=error.found,
            allowed=error.allowed,
            remedy=error.remedy,
        )
    return Check(
        name="port",
        is_ok=True,
        found=f"{host}:{port or 'any'} can be opened; {_describe_reachability(config)}",
    )


def _describe_reachability(config: PeerConfig) -> str:
    if config.announce:
        return f"announced as {', '.join(config.announce)}"
    address = _outgoing_address()
    if address is None:
        return "this machine has no route to other networks"
    kind = "private: peers elsewhere come through the relay" if address.is_private else "public"
    return (
        f"this machine's address is {address} ({kind}); whether a firewall is before it is unknown"
    )


def check_network(*, settings_folder: Path = Path("/proc/sys/net/ipv4")) -> Check:
    """What the kernel allows one connection; nothing here is needed, a distant peer is slower."""
    try:
        control = (settings_folder / "tcp_congestion_control").read_text().strip()
        most_bytes = int((settings_folder / "tcp_wmem").read_text().split()[2])
    except (OSError, ValueError, IndexError):
        return Check(name="network", is_ok=True, found="the kernel's TCP settings are unknown")
    found = f"TCP with {control}, send buffer up to {format_bytes(most_bytes)}"
    advice = []
    if control != "bbr":
        advice.append("net.ipv4.tcp_congestion_control=bbr (loss of 1 % then costs half, not all)")
    if most_bytes < _GOOD_SEND_BYTES:
        bound = 0.55 * most_bytes / 0.1 / 1e6  # measured: 23 MB/s with 4 MiB at 100 ms
        advice.append(
            f"net.ipv4.tcp_wmem='4096 16384 {_GOOD_SEND_BYTES}' (a peer 100 ms away now gets at "
            f"most about {bound:.0f} MB/s over TCP)"
        )
    if advice:
        found += "; for a faster link to distant peers: sysctl -w " + " and ".join(advice)
    return Check(name="network", is_ok=True, found=found)


def _outgoing_address() -> ipaddress.IPv4Address | None:
    """Local address of the default route; no packet is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(("192.0.2.1", 9))
            return ipaddress.IPv4Address(sock.getsockname()[0])
    except OSError:
        return None


def check_coordinator(config: PeerConfig, join_string: JoinString | None) -> list[Check]:
    """Reachability of the coordinator and the clock offset, when one is known."""
    if join_string is None:
        saved = load_membership(config.home)
        if saved is None:
            return [
                Check(
                    name="coordinator",
                    is_ok=True,
                    found="none known; pass a join string to check one",
                )
            ]
        join_string = saved.join_string
    try:
        offset_seconds, uncertainty_seconds = asyncio.run(_measure_clock(join_string))
    except MusterError as error:
        return [
            Check(
                name="coordinator",
                is_ok=False,
                found=error.found,
                allowed=error.allowed,
                remedy=error.remedy,
                bad_exit_code=error.exit_code,
            )
        ]
    is_close = abs(offset_seconds) - uncertainty_seconds <= CLOCK_WARN_SECONDS
    return [
        Check(
            name="coordinator",
            is_ok=True,
            found=f"{join_string.address} answers, run {join_string.run_id}",
        ),
        Check(
            name="clock",
            is_ok=is_close,
            found=f"{offset_seconds:+.3f} s (+- {uncertainty_seconds:.3f} s) against the "
            "coordinator",
            allowed=f"below {CLOCK_WARN_SECONDS} s; refused above {CLOCK_REFUSE_SECONDS} s",
            remedy="synchronise the clock: timedatectl set-ntp true",
        ),
    ]


async def _measure_clock(join_string: JoinString) -> tuple[float, float]:
    client = await CoordinatorClient.open(join_string, peer_id=PeerId(""))
    try:
        _, clock = await client.challenge()
    finally:
        await client.close()
    return clock.offset_seconds, clock.uncertainty_seconds


def check_training_speed(config: PeerConfig, *, is_fresh: bool) -> Check:
    """Device and measured training FLOP/s; measured once per torch version, device and number of
    threads.
    """
    if importlib.util.find_spec("torch") is None:
        return Check(
            name="device",
            is_ok=False,
            found="torch is not installed",
            allowed="torch",
            remedy="pip install -c ops/constraints.txt '.[peer]' in Muster's folder",
        )
    key = {
        "threads": config.threads,
        "asked_device": asked_devices(config)[0],
        "asked_execution": config.execution,
        "torch": metadata.version("torch"),
    }
    cache = config.home / _PROBE_FILE
    probe = None if is_fresh else _load_probe(cache, key)
    is_cached = probe is not None
    if probe is None:
        try:
            probe = run_probe(config)
        except MachineError as error:
            return _refused_device(error)
        if config.home.is_dir():
            write_atomically(cache, json.dumps(key | {"probe": probe}).encode())
    speed = float(str(probe["flop_per_second"]))
    return Check(
        name="device",
        is_ok=speed > 0,
        found=(
            f"{probe['device']} ({probe['device_name']}, {probe['threads']} threads, "
            f"{probe['precision']}, {probe['execution']}): "
            f"{speed / 1e9:.1f} GFLOP/s in training, "
            f"{100 * float(str(probe['mfu_ratio'])):.0f} % of what matrix products reach here "
            f"({float(str(probe['product_flop_per_second'])) / 1e9:.0f}), "
            f"{float(str(probe['tokens_per_second'])):,.0f} tokens/s of the tiny "
            f"preset{' (measured before)' if is_cached else ''}; {probe['reason']}"
        ),
        allowed="a device that torch can use",
        details=probe,
    )


def _refused_device(error: MusterError) -> Check:
    return Check(
        name="device",
        is_ok=False,
        found=error.found,
        allowed=error.allowed,
        remedy=error.remedy,
    )


def check_asked_devices(config: PeerConfig) -> Check | None:
    """What is wrong with the named devices or the layout; None if nothing is."""
    try:
        check_machine(config)
        require_devices(config)
    except MusterError as error:
        return _refused_device(error)
    return None


def check_step_plan(config: PeerConfig) -> Check:
    """What the trainer chose for the model that was measured last, and why; a later run of one that
    was measured before is not seen.
    """
    if problem := problem_of_cache(config.step_cache):
        return Check(
            name="step",
            is_ok=False,
            found=f"{problem}: the step is built and measured at every start",
            allowed="a directory of this user that nobody else may write to",
            remedy=f"remove it, or: chmod 700 {config.step_cache}",
        )
    status = load_status(config.home) or {}
    pid = holder_of_lock(config.home)
    if status.get("step_plan") and pid is not None:
        return _step_in_use(status, f"in use by pid {pid}")
    plans = config.step_cache.glob("plan-*.json")
    newest = max(plans, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None and status.get("step_plan"):
        return _step_in_use(status, "used last")
    if newest is None:
        return Check(name="step", is_ok=True, found="no run's model was measured on this home yet")
    try:
        plan = json.loads(newest.read_bytes())
        return Check(
            name="step", is_ok=True, found=f"measured last: {plan['reason']}", details=plan
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Check(
            name="step",
            is_ok=False,
            found=f"{newest} cannot be read: {error}",
            allowed="what the trainer wrote",
            remedy="remove it; the next trainer measures again",
        )


def _step_in_use(status: dict[str, Any], when: str) -> Check:
    """What a peer on this home does or did, on one device or several, from its status file."""
    speed = float(status.get("tokens_per_second") or 0)
    return Check(
        name="step",
        is_ok=True,
        found=f"{when}: {status.get('device') or 'device not known yet'}, "
        + (f"{speed:,.0f} tokens/s in training" if speed > 0 else "no step was trained yet")
        + f"; {status['step_plan']}",
        details={key: status.get(key) for key in ("device", "tokens_per_second", "step_plan")},
    )


def _load_probe(path: Path, key: dict[str, object]) -> dict[str, object] | None:
    try:
        plain = json.loads(path.read_bytes())
        is_same = all(plain[name] == value for name, value in key.items())
        return dict(plain["probe"]) if is_same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_probe(config: PeerConfig) -> dict[str, object]:
    """Measure in a process of its own. Raises MachineError."""
    command = [sys.executable, "-m", "peer.cli.probe", "--threads", str(config.threads)]
    command += ["--device", asked_devices(config)[0], "--execution", config.execution]
    if config.home.is_dir():
        with contextlib.suppress(OSError):  # the probe will say so
            config.step_cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        command += ["--cache", str(config.step_cache / "doctor")]
    environment = child_environment(config)
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=PROBE_SECONDS, env=environment, check=False
        )
        if done.returncode == 0:
            return dict(json.loads(done.stdout))
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no output"]
        found = f"the probe ended with exit code {done.returncode}: {reason[0]}"
    except (subprocess.TimeoutExpired, ValueError, OSError) as error:
        found = f"the probe failed: {error}"
    raise MachineError(found, allowed="a device that torch can use", remedy="try --device cpu")


def all_checks(
    config: PeerConfig, join_string: JoinString | None, *, has_probe: bool, is_fresh: bool
) -> list[Check]:
    """Everything, in the order in which it matters."""
    local: list[Callable[[PeerConfig], Check]] = [
        check_home,
        check_leftovers,
        check_memory,
        check_disk,
        check_port,
        check_step_plan,
    ]
    checks = [check_versions(), *(check(config) for check in local), check_network()]
    checks += check_coordinator(config, join_string)
    if (refused := check_asked_devices(config)) is not None:
        checks.append(refused)
    elif has_probe:
        checks.append(check_training_speed(config, is_fresh=is_fresh))
    return checks
