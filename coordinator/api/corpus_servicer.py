"""Corpus: files of the run's dataset. Training chunks go only to who holds an active lease on them
or a trial of a study, so that one member's key does not give the whole corpus away; manifest,
tokenizer and held-out chunks are for every member.
"""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.api.calls import Calls, caller
from coordinator.api.files import VerifiedFiles, read_parts
from coordinator.operations.common import OperationContext, load_run, load_run_data
from coordinator.store.base import Transaction
from protos.contract.chunk_format import (
    MANIFEST_FILE,
    TOKENIZER_FILE,
    heldout_chunk_path,
    training_chunk_path,
)
from protos.contract.errors import ErrorCode, RefusedError, UsageError
from protos.contract.initial_file import initial_path
from protos.muster.v1 import corpus_pb2, corpus_pb2_grpc


@dataclass(frozen=True, slots=True, kw_only=True)
class FindFileRequest:
    """Who wants which file."""

    run_id: str
    peer_id: str
    file: int
    """corpus_pb2.DatasetFile."""
    chunk_index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    """Where it lies and what it must be."""

    path: Path
    digest: str
    """Hex SHA-256."""


def find_file(
    tx: Transaction,
    request: FindFileRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> FoundFile:
    """Path and digest of the file if the peer may have it. Raises RefusedError (NOT_LEASED),
    UsageError. Only reads.
    """
    dataset_dir = context.data_dir / load_run(tx, request.run_id).dataset_dir
    manifest = load_run_data(tx, context, request.run_id).manifest
    if request.file == corpus_pb2.DATASET_FILE_MANIFEST:
        return FoundFile(path=dataset_dir / MANIFEST_FILE, digest=manifest.dataset_id)
    if request.file == corpus_pb2.DATASET_FILE_TOKENIZER:
        return FoundFile(path=dataset_dir / TOKENIZER_FILE, digest=manifest.tokenizer_digest)
    if request.file == corpus_pb2.DATASET_FILE_HELDOUT_CHUNK:
        _check_index(request.chunk_index, len(manifest.heldout_chunks))
        heldout_path = dataset_dir / heldout_chunk_path(request.chunk_index)
        return FoundFile(
            path=heldout_path, digest=manifest.heldout_chunks[request.chunk_index].digest
        )
    initial_digest = load_run_data(tx, context, request.run_id).spec.initial_digest
    if request.file == corpus_pb2.DATASET_FILE_INITIAL_STATE and initial_digest:
        return FoundFile(
            path=context.data_dir / initial_path(initial_digest), digest=initial_digest
        )
    if request.file != corpus_pb2.DATASET_FILE_TRAINING_CHUNK:
        raise UsageError(
            f"file {request.file}", allowed="those of corpus.proto", remedy="upgrade the client"
        )
    _check_index(request.chunk_index, len(manifest.training_chunks))
    leases = tx.active_leases(request.run_id, request.peer_id)
    is_leased = any(lease.chunk_index == request.chunk_index for lease in leases)
    if not is_leased and not _has_trial(tx, request):
        raise RefusedError(
            f"chunk {request.chunk_index} is not leased to {request.peer_id}",
            allowed=f"chunks of its {len(leases)} active leases, any during a trial",
            remedy="acquire leases first",
            code=ErrorCode.NOT_LEASED,
        )
    training_path = dataset_dir / training_chunk_path(request.chunk_index)
    return FoundFile(
        path=training_path, digest=manifest.training_chunks[request.chunk_index].digest
    )


def _has_trial(tx: Transaction, request: FindFileRequest) -> bool:
    return any(
        (row.kind, row.state, row.peer_id) == ("TRIAL", "ASSIGNED", request.peer_id)
        for row in tx.pending_duties(request.run_id)
    )


class CorpusServicer(corpus_pb2_grpc.CorpusServicer):
    """See corpus.proto."""

    def __init__(self, *, calls: Calls, observe_sent: Callable[[str, int], None]) -> None:
        self._calls = calls
        self._files = VerifiedFiles()
        self._observe_sent = observe_sent

    async def FetchFile(
        self, request: corpus_pb2.FetchFileRequest, context: Any
    ) -> AsyncIterator[corpus_pb2.FileMessage]:
        """One file in parts; the whole size in the first message."""
        wanted = FindFileRequest(
            run_id=caller().run_id,
            peer_id=caller().peer_id,
            file=request.file,
            chunk_index=request.chunk_index,
        )
        found = await self._calls.read(find_file, wanted)
        await self._files.require(found.path, digest=found.digest)
        kind = corpus_pb2.DatasetFile.Name(request.file).removeprefix("DATASET_FILE_").lower()
        is_first = True
        async for part, total_bytes in read_parts(found.path):
            yield corpus_pb2.FileMessage(data=part, total_bytes=total_bytes if is_first else 0)
            self._observe_sent(kind, len(part))
            is_first = False


def _check_index(chunk_index: int, num_chunks: int) -> None:
    if chunk_index >= num_chunks:
        raise UsageError(
            f"chunk {chunk_index}",
            allowed=f"0 to {num_chunks - 1}",
            remedy="fetch the manifest of this run",
        )
