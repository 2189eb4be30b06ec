"""The run's dataset on this machine: manifest, tokenizer, held-out chunks and leased chunks, each
checked by digest.

Everything lies in one content-addressed cache under home/cache, so a second run on the same corpus
downloads nothing. The dataset id is the manifest's digest, the manifest names the digests of the
rest; nothing is taken on the coordinator's word.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from peer.data.fetch import ChunkCache, WantedFile
from protos.contract.answer_records import check_objective
from protos.contract.chunk_format import ChunkEntry, Manifest
from protos.contract.errors import CorruptDataError
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import RunSpec
from protos.muster.v1 import corpus_pb2

_MAX_INITIAL_HEADER_BYTES = 2**17
_MAX_MANIFEST_BYTES = 64 * 2**20
_MAX_TOKENIZER_BYTES = 64 * 2**20
_UNLIMITED_BYTES = 2**62
_PARALLEL_DOWNLOADS = 4

FetchFile = Callable[[int, int], AsyncIterator[bytes]]
"""(corpus_pb2.DatasetFile, chunk index) -> stream of the file's bytes."""


class Dataset:
    """Files of one dataset, fetched when they are needed."""

    def __init__(
        self, cache_folder: Path, *, spec: RunSpec, limit_bytes: int | None, fetch_file: FetchFile
    ) -> None:
        self._spec = spec
        self._cache = ChunkCache(cache_folder, limit_bytes=limit_bytes or _UNLIMITED_BYTES)
        self._fetch_file = fetch_file
        self._downloads = asyncio.Semaphore(_PARALLEL_DOWNLOADS)
        self._manifest: Manifest | None = None
        self.tokenizer_path = Path()
        self.heldout_paths: tuple[Path, ...] = ()

    @property
    def manifest(self) -> Manifest:
        """Contents of the dataset, once `prepare` has returned."""
        assert self._manifest is not None
        return self._manifest

    @property
    def fetched_bytes(self) -> int:
        """Downloaded since the start."""
        return self._cache.stats.fetched_bytes

    async def prepare(self) -> None:
        """Fetch everything but training chunks. Raises CorruptDataError, UsageError for a dataset
        of another objective, MachineError, UnavailableError.
        """
        dataset_id = bytes.fromhex(self._spec.data.dataset_id)
        manifest_file = WantedFile(
            name="manifest.json", digest=dataset_id, max_bytes=_MAX_MANIFEST_BYTES
        )
        path = await self._fetch(manifest_file, corpus_pb2.DATASET_FILE_MANIFEST)
        manifest = Manifest.from_bytes(path.read_bytes())
        check_objective(
            manifest,
            objective=self._spec.objective.name,
            seq_len=self._spec.model.seq_len,
        )
        extra_tokens = self._spec.objective.num_extra_tokens(self._spec.model.seq_len)
        if manifest.vocab_size + extra_tokens > self._spec.model.vocab_size:
            raise CorruptDataError(
                f"{manifest.vocab_size} token ids of the dataset, {extra_tokens} of the objective",
                allowed=f"at most the model's {self._spec.model.vocab_size}",
                remedy="the run was created wrongly; tell its operator",
            )
        self._manifest = manifest
        tokenizer_file = WantedFile(
            name="tokenizer.json",
            digest=bytes.fromhex(manifest.tokenizer_digest),
            max_bytes=_MAX_TOKENIZER_BYTES,
        )
        tokenizer = self._fetch(tokenizer_file, corpus_pb2.DATASET_FILE_TOKENIZER)
        heldout = [
            self._fetch(
                self._wanted(chunk, f"held-out chunk {index}"),
                corpus_pb2.DATASET_FILE_HELDOUT_CHUNK,
                chunk_index=index,
            )
            for index, chunk in enumerate(manifest.heldout_chunks)
        ]
        self.tokenizer_path, *paths = await asyncio.gather(
            tokenizer, *heldout, *self._fetch_initial()
        )
        del paths[len(heldout) :]
        self.heldout_paths = tuple(paths)

    def _fetch_initial(self) -> Iterator[Coroutine[Any, Any, Path]]:
        """The imported model that the run starts from, if its spec names one; kept in the cache."""
        if not self._spec.initial_digest:
            return
        digest = bytes.fromhex(self._spec.initial_digest)
        vector_bytes = ModelShape.from_spec(self._spec.model).vector_bytes
        self._cache.hold(digest)
        wanted = WantedFile(
            name="imported model",
            digest=digest,
            max_bytes=vector_bytes + _MAX_INITIAL_HEADER_BYTES,
        )
        yield self._fetch(wanted, corpus_pb2.DATASET_FILE_INITIAL_STATE)

    async def fetch_chunk(self, chunk_index: int, *, digest: bytes) -> Path:
        """Fetch a leased training chunk; `digest` is what the lease names, which must be the
        manifest's.
        """
        chunks = self.manifest.training_chunks
        if chunk_index >= len(chunks) or bytes.fromhex(chunks[chunk_index].digest) != digest:
            raise CorruptDataError(
                f"a lease of chunk {chunk_index} with digest {digest.hex()[:16]}...",
                allowed=f"one of the manifest's {len(chunks)} training chunks",
                remedy="the coordinator's dataset is not the run's; tell its operator",
            )
        return await self._fetch(
            self._wanted(chunks[chunk_index], f"training chunk {chunk_index}"),
            corpus_pb2.DATASET_FILE_TRAINING_CHUNK,
            chunk_index=chunk_index,
        )

    def hold(self, digest: bytes) -> None:
        """Keep a chunk in the cache while a lease of it is held."""
        self._cache.hold(digest)

    def release(self, digest: bytes) -> None:
        """Undo one `hold`."""
        self._cache.release(digest)

    async def close(self) -> None:
        """Stop downloads."""
        await self._cache.close()

    def _wanted(self, chunk: ChunkEntry, name: str) -> WantedFile:
        num_bytes = self.manifest.file_bytes(chunk)
        return WantedFile(
            name=name,
            digest=bytes.fromhex(chunk.digest),
            max_bytes=num_bytes,
            num_bytes=num_bytes,
        )

    async def _fetch(self, wanted: WantedFile, file: int, *, chunk_index: int = 0) -> Path:
        async with self._downloads:
            return await self._cache.fetch(wanted, lambda _: self._fetch_file(file, chunk_index))
