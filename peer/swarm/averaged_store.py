"""Averaged bytes of the last steps, on disk and mapped: for laggards, and over a restart.

A file is called after the digest of its bytes and the number of its values, and is believed only
if that is what it holds. A vote promises that the bytes can be had, so they are on disk before it.
"""

import threading
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np

from peer.swarm.allreduce import AveragedVector
from peer.swarm.codecs import EncodedVector
from peer.swarm.durable_file import replace_durably, sync_folder
from protos.contract.codecs_wire import result_codec_of_bytes
from protos.contract.errors import CorruptDataError

_NUM_KEPT = 4
_NUM_KEPT_WHILE_SERVING = 16


class AveragedStore:
    """The folder of one run."""

    def __init__(self, folder: Path, *, codec_name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for entered in folder.parents[:2]:
            sync_folder(entered)
        self._folder, self._codec_name = folder, codec_name
        self._averaged: OrderedDict[bytes, AveragedVector] = OrderedDict()
        self._guard = threading.Lock()
        self.is_serving = False
        """True while somebody downloads a state from here, who needs the way from there on too."""

    def hold(self, averaged: AveragedVector) -> None:
        """Keep averaged bytes durably, and drop the oldest of too many. Any thread: the same bytes
        may come from the own reduction and from a member at once.
        """
        with self._guard:
            if averaged.averaged_digest in self._averaged:
                return
            path = self._path(averaged)
            replace_durably(path, averaged.encoded.data)
            mapped = replace(averaged.encoded, data=_mapped(path))
            self._averaged[averaged.averaged_digest] = replace(averaged, encoded=mapped)
            while len(self._averaged) > (_NUM_KEPT_WHILE_SERVING if self.is_serving else _NUM_KEPT):
                _, oldest = self._averaged.popitem(last=False)
                self._path(oldest).unlink(missing_ok=True)

    def load(self) -> None:
        """Take up what an earlier life has left, checked."""
        for path in sorted(self._folder.glob("*.bin"), key=lambda p: p.stat().st_mtime):
            averaged = self._open(path)
            if averaged is None:
                path.unlink(missing_ok=True)
            else:
                self._averaged[averaged.averaged_digest] = averaged
        for leftover in self._folder.glob("*.tmp"):
            leftover.unlink(missing_ok=True)

    @property
    def digests(self) -> tuple[bytes, ...]:
        """Digests of what is held."""
        return tuple(self._averaged)

    def find(self, averaged_digest: bytes) -> AveragedVector | None:
        """Averaged bytes, if they are held."""
        return self._averaged.get(averaged_digest)

    def _open(self, path: Path) -> AveragedVector | None:
        """Averaged bytes of a file, None if they are not what its name says."""
        try:
            num_values = int(path.stem.partition("-")[2])
            data = _mapped(path)
            codec = result_codec_of_bytes(
                self._codec_name, num_values=num_values, num_bytes=len(data)
            )
            encoded = EncodedVector(codec=codec, num_values=num_values, data=data)
            encoded.decoded()
        except (CorruptDataError, ValueError):
            return None
        averaged = AveragedVector.from_encoded(encoded)
        return averaged if self._path(averaged).name == path.name else None

    def _path(self, averaged: AveragedVector) -> Path:
        digest_hex = averaged.averaged_digest.hex()[:32]
        return self._folder / f"{digest_hex}-{averaged.encoded.num_values}.bin"


def _mapped(path: Path) -> memoryview:
    """Bytes of a file, read when they are used. Raises ValueError for an empty one."""
    return np.memmap(path, dtype=np.uint8, mode="r").data
