"""The rendezvous child: `muster-peer rendezvous`, the first address of the DHT, kept alive beside
the coordinator.

It is a process of its own because hivemind may not be imported here. It prints one JSON line with
its multiaddresses when it is reachable. If it dies it is started again after a pause that doubles
up to a minute; peers that know one another do not need it meanwhile. Its identity lies in its home,
so the addresses stay the same over restarts. A coordinator that is killed takes the child along
(--die-with-parent: the child asks the kernel itself, so no Python runs between fork and exec).
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

from coordinator.ports import require_free
from protos.contract.errors import ErrorCode, MachineError

_LOGGER = logging.getLogger(__name__)
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
_STABLE_SECONDS = 60.0
"""A child that lived this long begins again with the first pause."""
_READY_DEADLINE_SECONDS = 60.0
_STOP_DEADLINE_SECONDS = 5.0


class Rendezvous:
    """Starts the child, keeps it alive and knows its addresses."""

    def __init__(self, *, home: Path, host: str, port: int, announced_address: str = "") -> None:
        """`announced_address` is a multiaddress that others reach it at, if it cannot know
        itself.
        """
        self._announced_address = announced_address
        self._home = home
        self._host = host
        self._port = port
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self.is_ready = False
        """True while the child is known to be reachable."""
        self.addresses: tuple[str, ...] = ()
        """Multiaddresses of the living child; the last known ones while it restarts."""

    @property
    def pid(self) -> int | None:
        """Process id of the child; None between two of them."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the child and wait until it is reachable. Raises MachineError if it cannot be."""
        if find_spec("hivemind") is None:
            raise MachineError(
                "the rendezvous needs hivemind, which is not installed here",
                allowed="the package's [peer] extra, or a rendezvous elsewhere",
                remedy="pip install -c ops/constraints.txt '.[peer]' in Muster's folder, or pass "
                "--rendezvous MULTIADDRESS of one that runs elsewhere",
                code=ErrorCode.DEPENDENCY_MISSING,
            )
        require_free(self._host, self._port, what="the rendezvous", flag="--rendezvous-port")
        await self._launch()
        self._keeper = asyncio.create_task(self._keep_alive(), name="rendezvous keeper")

    async def stop(self) -> None:
        """End the child in good order, by force after a deadline."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        await self._end_child()

    async def _launch(self) -> None:
        command = [sys.executable, "-m", "peer.cli.main", "--die-with-parent", "rendezvous"]
        command += ["--home", str(self._home), "--host", self._host]
        command += ["--port", str(self._port), "--json"]
        if self._announced_address:
            command += ["--announce", self._announced_address]
        self._home.mkdir(parents=True, exist_ok=True)
        log_path = self._home / "rendezvous.log"
        with log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(_READY_DEADLINE_SECONDS):
                line = await self._process.stdout.readline()
            addresses = tuple(str(address) for address in json.loads(line)["addresses"])
        except (TimeoutError, ValueError, KeyError, TypeError) as error:
            await self._end_child()
            raise MachineError(
                f"the rendezvous did not come up on port {self._port}",
                allowed="a free port and a working [peer] extra",
                remedy=f"see the end of {log_path}, or pass --rendezvous-port PORT or "
                "--rendezvous MULTIADDRESS",
                code=ErrorCode.DEPENDENCY_MISSING,
            ) from error
        self.addresses = addresses
        self.is_ready = True
        _LOGGER.info("rendezvous is up at %s", ", ".join(addresses))

    async def _keep_alive(self) -> None:
        pause_seconds = _FIRST_PAUSE_SECONDS
        loop = asyncio.get_running_loop()
        while True:
            began_monotonic_seconds = loop.time()
            if self._process is not None:
                exit_code = await self._process.wait()
                self.is_ready = False
                _kill_group(self._process.pid)
                _LOGGER.warning("rendezvous ended with exit code %s; starting it again", exit_code)
            if loop.time() - began_monotonic_seconds > _STABLE_SECONDS:
                pause_seconds = _FIRST_PAUSE_SECONDS
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)
            try:
                await self._launch()
            except (MachineError, OSError) as error:
                _LOGGER.warning(
                    "rendezvous cannot be started, next try in %.0f s: %s", pause_seconds, error
                )

    async def _end_child(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(_STOP_DEADLINE_SECONDS):
                    await process.wait()
            except TimeoutError:
                _LOGGER.warning(
                    "rendezvous did not end within %.0f s; killing it", _STOP_DEADLINE_SECONDS
                )
        _kill_group(process.pid)
        await process.wait()


def _kill_group(pid: int) -> None:
    """Kill what is left of the child's own process group: p2pd, if the child could not end it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
