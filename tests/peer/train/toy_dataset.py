"""A dataset small enough for tests that train."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from protos.contract.chunk_format import ChunkEntry, Manifest, Source, chunk_from_tokens
from protos.contract.run_spec import DataSpec, RunSpec
from tests.peer.model.tiny import SPEC
from tests.peer.train.harness import CHUNK_WINDOWS


def build_toy_dataset(folder: Path) -> RunSpec:
    """Write predictable text, three training chunks and one held out; returns a spec for it."""
    model = SPEC.model
    (folder / "chunks").mkdir()
    entries = []
    for index in range(4):
        tokens = (np.arange(CHUNK_WINDOWS * model.seq_len + 1) * 7 + index) % model.vocab_size
        data = chunk_from_tokens(tokens, vocab_size=model.vocab_size)
        name = f"train-{index:06d}.bin" if index < 3 else "heldout-000000.bin"
        (folder / "chunks" / name).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        entries.append(
            ChunkEntry(source_index=0, num_tokens=tokens.size, digest=digest, num_bytes=tokens.size)
        )
    vocab = {chr(0x100 + index): index for index in range(model.vocab_size)}
    tokenizer = json.dumps({"model": {"vocab": vocab}, "added_tokens": []}).encode()
    (folder / "tokenizer.json").write_bytes(tokenizer)
    manifest = Manifest(
        vocab_size=model.vocab_size,
        eos_token_id=0,
        token_dtype="<u2",
        tokenizer_digest=hashlib.sha256(tokenizer).hexdigest(),
        chunk_bytes=4096,
        seed=0,
        sources=(
            Source(
                name="s",
                origin="o",
                licence="l",
                weight=1.0,
                num_documents=1,
                num_bytes=1,
                num_tokens=1,
            ),
        ),
        training_chunks=tuple(entries[:3]),
        heldout_chunks=tuple(entries[3:]),
    )
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    return replace(SPEC, budget_tokens=12 * 150, data=DataSpec(dataset_id=manifest.dataset_id))
