"""The chunks of held leases: fetched in the order of the leases, kept while one needs them, told to
the trainer by path.
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from peer import session_events as ev
from peer.daemon.coordinator_tasks import LeaseBytes
from peer.daemon.core import Core
from peer.daemon.dataset import Dataset
from peer.lease_holdings import UsedRange
from protos.contract.errors import MusterError, UnavailableError

_LOGGER = logging.getLogger(__name__)
_RETRY_SECONDS = 2.0


class LeaseChunks:
    """Which chunk file belongs to which lease of the current incarnation."""

    def __init__(
        self,
        core: Core,
        *,
        dataset: Dataset,
        lease_by_number: MutableMapping[int, LeaseBytes],
        is_dataset_ready: asyncio.Event,
    ) -> None:
        """`lease_by_number` holds the leases of the current incarnation; ended ones are removed
        from it here.
        """
        self._core, self._dataset = core, dataset
        self._lease_by_number = lease_by_number
        self._is_dataset_ready = is_dataset_ready
        self._held_digest_by_lease: dict[tuple[int, int], bytes] = {}
        self._path_by_lease: dict[tuple[int, int], Path] = {}
        self._noted_reasons: set[str] = set()
        """Why chunks could not be had, as the owner was told."""

    def entries(self, parts: Iterable[UsedRange]) -> list[Mapping[str, Any]]:
        """Parts of fetched leases as the trainer is told them."""
        entries: list[Mapping[str, Any]] = []
        for part in parts:
            known = self._lease_by_number[part.lease_number]
            entries.append(
                {
                    "lease": known.signed,
                    "lease_number": part.lease_number,
                    "data_pass": known.lease.range.data_pass,
                    "chunk_index": known.lease.range.chunk_index,
                    "begin_window": part.begin_window,
                    "end_window": part.end_window,
                    "path": str(self._path_by_lease[self._key(part.lease_number)]),
                }
            )
        return entries

    async def fetch(self, lease_numbers: Iterable[int]) -> None:
        """Fetch what the leases need; the session hears of each lease when it is there, or cannot
        be had.
        """
        await self._is_dataset_ready.wait()
        await asyncio.gather(*(self._fetch_one(number) for number in lease_numbers))

    async def _fetch_one(self, lease_number: int) -> None:
        key = self._key(lease_number)
        known = self._lease_by_number.get(lease_number)
        if known is None:
            return
        digest = known.lease.chunk_digest
        if key not in self._held_digest_by_lease:
            self._held_digest_by_lease[key] = digest
            self._dataset.hold(digest)
        event: ev.Event
        while True:
            try:
                path = await self._dataset.fetch_chunk(known.lease.range.chunk_index, digest=digest)
                self._path_by_lease[key] = path
                event = ev.LeaseFetched(lease_number=lease_number)
                break
            except UnavailableError as error:
                _LOGGER.info("chunk of lease %d: %s; trying again", lease_number, error.found)
                await asyncio.sleep(_RETRY_SECONDS)
            except MusterError as error:
                if error.found not in self._noted_reasons:  # the same lease may come back for hours
                    self._noted_reasons.add(error.found)
                    self._core.note(f"lease {lease_number} is released: {error}")
                event = ev.LeaseUnusable(lease_number=lease_number, reason=error.found)
                break
        is_known = self._lease_by_number.get(lease_number) is known
        if is_known and key == self._key(lease_number):
            self._core.feed(event)

    def forget_ended(self) -> None:
        """Let the cache have the chunks of leases that are no longer held."""
        incarnation = self._core.numbers.incarnation
        renewed = set(self._core.machine.leases.renewed_numbers)
        for key, digest in list(self._held_digest_by_lease.items()):
            if key[0] != incarnation or key[1] not in renewed:
                self._dataset.release(digest)
                del self._held_digest_by_lease[key]
                self._path_by_lease.pop(key, None)
        for number in set(self._lease_by_number) - renewed:
            del self._lease_by_number[number]

    def _key(self, lease_number: int) -> tuple[int, int]:
        return self._core.numbers.incarnation, lease_number
