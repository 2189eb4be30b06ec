"""A peer of a run that starts from an imported model: it waits for the file, and its state at step
0 is that model.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peer.checkpoint.initial import imported_model_path, save_initial
from peer.daemon.dataset import Dataset
from peer.model.init import fill_normal, initial_vector
from peer.swarm.catch_up import CatchUp
from protos.contract.chunk_format import MANIFEST_FILE, heldout_chunk_path
from protos.contract.errors import CorruptDataError
from protos.contract.initial_file import InitialHeader
from protos.contract.run_spec import DataSpec
from protos.muster.v1 import corpus_pb2
from tests.peer.swarm.swarm_hub import NUM_VALUES, SPEC, Hub
from tests.peer.train.toy_dataset import build_toy_dataset


def test_the_initial_state_is_the_imported_model(tmp_path: Path) -> None:
    dataset, homes = tmp_path / "dataset", tmp_path / "homes"
    dataset.mkdir()
    homes.mkdir()
    toy = build_toy_dataset(dataset)
    params = np.empty(NUM_VALUES, dtype=np.float32)
    fill_normal(params, seed=9, name="imported", std=0.1)
    header = InitialHeader(
        model=SPEC.model, tokenizer_digest="0" * 64, eos_token_id=0, origin="test"
    )
    digest = save_initial(tmp_path / "initial.safetensors", header, params)
    spec = replace(SPEC, initial_digest=digest, data=DataSpec(dataset_id=toy.data.dataset_id))
    hub = Hub(homes, spec)
    hub.add_daemon()
    hub.begin()
    daemon = hub.daemons[0]
    replica = hub.replica(daemon)
    replica.enter_incarnation(hub.record)
    assert not replica.build_initial() and replica.meta is None, "it waits for the file"
    path = imported_model_path(daemon.home, spec)
    assert path is not None
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"something else")
    with pytest.raises(CorruptDataError, match="digest"):
        replica.build_initial()
    path.unlink()

    paths = {
        corpus_pb2.DATASET_FILE_MANIFEST: dataset / MANIFEST_FILE,
        corpus_pb2.DATASET_FILE_TOKENIZER: dataset / "tokenizer.json",
        corpus_pb2.DATASET_FILE_HELDOUT_CHUNK: dataset / heldout_chunk_path(0),
        corpus_pb2.DATASET_FILE_INITIAL_STATE: tmp_path / "initial.safetensors",
    }

    async def fetch_file(file: int, _index: int) -> AsyncIterator[bytes]:
        yield paths[file].read_bytes()

    async def prepare() -> None:
        files = Dataset(daemon.home / "cache", spec=spec, limit_bytes=None, fetch_file=fetch_file)
        await files.prepare()
        assert len(files.heldout_paths) == 1
        await files.close()

    asyncio.run(prepare())
    catch_up = CatchUp(replica, None, own_peer_id=daemon.peer_id)  # type: ignore[arg-type]
    assert asyncio.run(catch_up.rebase())
    assert np.array_equal(replica.vectors.params, params)
    assert not np.array_equal(params, initial_vector(SPEC))
    assert replica.meta is not None and replica.meta.run_digest == spec.run_digest
    assert replica.position[1] == 0 and len(replica.state_digest) == 32
