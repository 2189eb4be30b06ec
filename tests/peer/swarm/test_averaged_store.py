"""Averaged bytes on disk: kept once, whoever brings them, and the oldest go."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

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
