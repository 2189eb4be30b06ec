"""Averaged bytes on disk: kept once and durably, whoever brings them, and the oldest go."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from peer.swarm.allreduce import AveragedVector
from peer.swarm.averaged_store import AveragedStore
from peer.swarm.codecs import EncodedVector
from protos.contract.codecs_wire import codec_named


def averaged(number: int, num_values: int = 50_000) -> AveragedVector:
    vector = np.full(num_values, number, dtype=np.float32)
    return AveragedVector.from_encoded(EncodedVector.encode(codec_named("fp32"), vector))


def test_the_same_bytes_from_two_sides_at_once(tmp_path: Path) -> None:
    """The own reduction and a member that was asked bring them in the same moment."""
    store = AveragedStore(tmp_path / "averaged", codec_name="fp32")
    with ThreadPoolExecutor(8) as pool:
        for number in range(40):
            brought = averaged(number)
            for done in [pool.submit(store.hold, brought) for _ in range(8)]:
                done.result()
            held = store.find(brought.averaged_digest)
            assert held is not None and held.averaged_digest == brought.averaged_digest
    assert len(store.digests) == len(list((tmp_path / "averaged").iterdir())) == 4
    again = AveragedStore(tmp_path / "averaged", codec_name="fp32")
    again.load()
    assert set(again.digests) == set(store.digests)


def test_bytes_and_their_name_are_on_disk_before_they_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a vote promises must outlive power loss: the file is synced before it gets its name, the
    folder after, and the bytes are held only then.
    """
    folder, brought = tmp_path / "averaged", averaged(1)
    store = AveragedStore(folder, codec_name="fp32")
    seen: list[tuple[str, list[str], bool]] = []
    fsync = os.fsync

    def recorded(fd: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{fd}")).name
        there = sorted(path.suffix for path in folder.iterdir())
        seen.append((name, there, store.find(brought.averaged_digest) is not None))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", recorded)
    store.hold(brought)
    temporary = f"{brought.averaged_digest.hex()[:32]}-{50_000}.tmp"
    assert seen == [(temporary, [".tmp"], False), ("averaged", [".bin"], False)]
    assert store.find(brought.averaged_digest) is not None
