"""Devices that the owner named, looked at before a peer joins with them.

For CUDA devices torch answers, in a process of its own (`python -m peer.cli.devices NAME...`), for
the daemon has none. Devices that need no driver are not tried, so that joining with a CPU costs
nothing more; of shares of the CPU the memory is looked at.
"""

import json
import subprocess
import sys

from peer.cli.options import print_json
from peer.config import PeerConfig, child_environment, format_bytes
from peer.parallel.layout import device_names
from peer.parallel.machine_memory import RUNTIME_BYTES, host_memory_bytes, max_cpu_shares
from protos.contract.errors import ErrorCode, MachineError

_CHECK_SECONDS = 120.0
"""Imports of torch and the driver's start on a busy machine."""
ALLOWED = "a device that torch can use"


def asked_devices(config: PeerConfig) -> list[str]:
    """torch's names of the devices that are lent; "auto" and "cuda" as they are."""
    return device_names(config.devices or config.device)


def require_devices(config: PeerConfig) -> None:
    """Raise MachineError for a named device that torch cannot use here, and for more shares of the
    CPU than its memory can be divided into, whatever the model.
    """
    names = asked_devices(config)
    if len(names) > 1 and names[0] == "cpu":
        _require_memory(len(names), limit_bytes=config.memory_limit_bytes)
    if not names[0].startswith("cuda"):
        return
    command = [sys.executable, "-m", "peer.cli.devices", *names]
    found = answer = ""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_CHECK_SECONDS,
            env=child_environment(config),
            check=False,
        )
        answer = done.stdout
        refusal = json.loads(answer)
    except (subprocess.TimeoutExpired, OSError) as error:
        found = f"torch did not answer whether it can use {names[0]}: {error}"
    except ValueError:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        found = f"torch cannot be asked for {names[0]}: {last[0]}"
    if found:
        raise MachineError(found, allowed=ALLOWED, remedy="try --device cpu")
    if refusal:
        raise MachineError(**refusal, code=ErrorCode.CAPABILITY_MISSING)


def _require_memory(num_shares: int, *, limit_bytes: int | None) -> None:
    left_bytes = host_memory_bytes()
    memory_bytes = min(left_bytes, limit_bytes or left_bytes)
    most = max(1, max_cpu_shares(memory_bytes))
    if num_shares > most:
        raise MachineError(
            f"--devices cpu:{num_shares} with {format_bytes(memory_bytes)} of memory",
            allowed=f"at most cpu:{most}: each share is a process of "
            f"{format_bytes(RUNTIME_BYTES)} before it holds any of the model",
            remedy="lend at most one share per core, or leave --devices out",
            code=ErrorCode.CAPABILITY_MISSING,
        )


def main(names: list[str]) -> int:
    """Print the first device's refusal in its three parts, {} if all can be used."""
    from peer.parallel.devices import choose_device

    try:
        for name in names:
            choose_device(name)
    except MachineError as error:
        refusal = {"found": error.found, "allowed": error.allowed, "remedy": error.remedy}
        print_json(refusal)
        return error.exit_code
    print_json({})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
