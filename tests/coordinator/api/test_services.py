"""Leases, dataset files, duties and checkpoints over a real server."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from safetensors.numpy import save

from coordinator.operations.ledger_verify import verify_ledger
from coordinator.operations.requests_ledger import VerifyLedgerRequest
from protos.contract.channel import error_from_rpc
from protos.contract.digest import StateMeta, state_digest
from protos.contract.errors import CorruptDataError, ErrorCode, MusterError, UsageError
from protos.muster.v1 import common_pb2, corpus_pb2, duties_pb2, leases_pb2, rounds_pb2
from tests.coordinator.loopback import (
    NUM_TRAINING_CHUNKS,
    RUN_ID,
    SEQ_LEN,
    Client,
    deployed,
    eventually,
)


def test_leases_files_and_leave(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deployed(tmp_path) as deployment, deployment.client() as client:
            await client.reach_incarnation_one()
            leases = await client.acquire(4 * SEQ_LEN, request_id="one")
            assert sum(lease.range.end_window - lease.range.begin_window for lease in leases) == 4
            assert await client.acquire(4 * SEQ_LEN, request_id="one") == leases
            other = leases_pb2.AcquireLeasesRequest(
                request_id="one", incarnation=1, wanted_tokens=8
            )
            with pytest.raises(UsageError, match="used before"):
                await client.call("Leases", "AcquireLeases", other)
            await check_files(
                client, deployment.manifest, {lease.range.chunk_index for lease in leases}
            )
            release = leases_pb2.ReleaseLeasesRequest(
                request_id="r", incarnation=1, lease_numbers=[leases[0].lease_number], reason="test"
            )
            assert (await client.call("Leases", "ReleaseLeases", release)).num_released_leases == 1
            assert (await client.call("Leases", "ReleaseLeases", release)).num_released_leases == 0
            exchange = rounds_pb2.CoordinatorExchangeRequest(incarnation=1, outer_step=1, attempt=1)
            assert (await client.call("Rounds", "Exchange", exchange)).is_promised
            fetch = rounds_pb2.FetchCertificatesRequest(incarnation=1, from_outer_step=1)
            fetched = await client.call("Rounds", "FetchCertificates", fetch)
            assert not fetched.certificates
            verdict = await deployment.coordinator.look(
                verify_ledger, VerifyLedgerRequest(run_id=RUN_ID)
            )
            assert verdict.violations == ()

    asyncio.run(scenario())


def test_damaged_files_are_named_and_served_again_once_restored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with deployed(tmp_path) as deployment, deployment.client() as client:
            await client.reach_incarnation_one()
            (lease,) = await client.acquire(SEQ_LEN, request_id="one")
            index = lease.range.chunk_index
            path = deployment.data_dir / "datasets" / "test" / f"chunks/train-{index:06}.bin"
            whole = path.read_bytes()
            request = corpus_pb2.FetchFileRequest(
                file=corpus_pb2.DATASET_FILE_TRAINING_CHUNK, chunk_index=index
            )
            for damaged in (bytes([whole[0] ^ 1]) + whole[1:], whole[:-1], None):
                caplog.clear()
                path.unlink() if damaged is None else path.write_bytes(damaged)
                for _ in range(2):
                    with pytest.raises(CorruptDataError, match=path.name) as caught:
                        await client.stream("Corpus", "FetchFile", request)
                    assert "restores" in caught.value.remedy
                lines = [line for line in caplog.messages if "is damaged" in line]
                assert len(lines) == 1 and str(path) in lines[0]
            path.write_bytes(whole)
            parts = await client.stream("Corpus", "FetchFile", request)
            assert b"".join(part.data for part in parts) == whole

    asyncio.run(scenario())


async def check_files(client: Client, manifest: Any, leased: set[int]) -> None:
    """Every kind of file has the manifest's digest; chunks that are not leased do not come."""

    async def fetch(file: int, chunk_index: int = 0) -> bytes:
        request = corpus_pb2.FetchFileRequest(file=file, chunk_index=chunk_index)
        parts = await client.stream("Corpus", "FetchFile", request)
        data = b"".join(part.data for part in parts)
        assert parts[0].total_bytes == len(data)
        return data

    assert await fetch(corpus_pb2.DATASET_FILE_MANIFEST) == manifest.to_bytes()
    tokenizer = await fetch(corpus_pb2.DATASET_FILE_TOKENIZER)
    assert hashlib.sha256(tokenizer).hexdigest() == manifest.tokenizer_digest
    heldout = await fetch(corpus_pb2.DATASET_FILE_HELDOUT_CHUNK)
    assert hashlib.sha256(heldout).hexdigest() == manifest.heldout_chunks[0].digest
    for index in range(NUM_TRAINING_CHUNKS):
        if index in leased:
            chunk = await fetch(corpus_pb2.DATASET_FILE_TRAINING_CHUNK, index)
            assert hashlib.sha256(chunk).hexdigest() == manifest.training_chunks[index].digest
            continue
        with pytest.raises(MusterError) as caught:
            await fetch(corpus_pb2.DATASET_FILE_TRAINING_CHUNK, index)
        assert caught.value.code is ErrorCode.NOT_LEASED
    with pytest.raises(UsageError):
        await fetch(corpus_pb2.DATASET_FILE_TRAINING_CHUNK, NUM_TRAINING_CHUNKS)
    with pytest.raises(UsageError):
        await fetch(corpus_pb2.DATASET_FILE_UNSPECIFIED)


def state_file(*, incarnation: int = 1, value: float = 0.5) -> tuple[bytes, bytes]:
    """(safetensors bytes, state digest) of a small state of outer step 0."""
    meta = StateMeta(
        run_digest="0" * 64,
        incarnation=incarnation,
        outer_step=0,
        schedule_tokens=0,
        directive_number=2,
    )
    vectors = {
        name: np.full(70_000, value + i, dtype=np.float32)
        for i, name in enumerate(("params", "exp_avg", "exp_avg_sq"))
    }
    data = save(vectors, metadata={"state_meta": meta.to_json().decode()})
    return data, state_digest(meta, list(vectors.values()))


def test_checkpoint_duty(tmp_path: Path) -> None:
    data, digest = state_file()

    async def scenario() -> None:
        changes = {"checkpoint_interval_seconds": 0.1, "num_evaluations": 1}
        async with deployed(tmp_path, **changes) as deployment, deployment.client() as client:
            fetch = duties_pb2.FetchCheckpointRequest()
            with pytest.raises(MusterError) as caught:
                await client.stream("Duties", "FetchCheckpoint", fetch)
            assert caught.value.code is ErrorCode.NOT_READY
            await client.reach_incarnation_one()
            attestation = client.attestation(incarnation=1, state_digest=digest)
            duty = await checkpoint_duty(client, attestation)
            header = duties_pb2.CheckpointHeader(
                duty_id=duty.duty_id,
                fence=duty.fence,
                attestation=attestation,
                total_bytes=len(data),
            )
            flipped = bytearray(data)
            flipped[-1] ^= 1
            with pytest.raises(CorruptDataError) as corrupt:
                await upload(client, header, bytes(flipped))
            assert corrupt.value.code is ErrorCode.DIGEST_MISMATCH
            with pytest.raises(CorruptDataError, match="received"):
                await upload(client, header, data[:-1])
            with pytest.raises(UsageError) as too_large:
                await upload(client, header, data + b"x")
            assert too_large.value.code is ErrorCode.TOO_LARGE
            huge = duties_pb2.CheckpointHeader()
            huge.CopyFrom(header)
            huge.total_bytes = 2**40
            with pytest.raises(UsageError) as too_large:
                await upload(client, huge, b"")
            assert too_large.value.code is ErrorCode.TOO_LARGE
            stale = duties_pb2.CheckpointHeader()
            stale.CopyFrom(header)
            stale.fence += 7
            assert not (await upload(client, stale, b"")).is_accepted
            accepted = await upload(client, header, data)
            assert accepted.is_accepted, accepted.reason
            parts = await client.stream("Duties", "FetchCheckpoint", fetch)
            assert b"".join(part.data for part in parts) == data
            assert (parts[0].state_digest, parts[0].total_bytes) == (digest, len(data))
            left_over = list((deployment.data_dir / "checkpoints").rglob("*.part"))
            assert left_over == []

    asyncio.run(scenario())


async def checkpoint_duty(client: Client, attestation: common_pb2.Signed) -> duties_pb2.Duty:
    """The duty to upload a checkpoint; evaluations on the way are declined."""

    async def probe() -> duties_pb2.Duty | None:
        reply = await client.heartbeat(incarnation=1, attestations=[attestation])
        if not reply.HasField("duty"):
            return None
        if reply.duty.kind == duties_pb2.DUTY_KIND_CHECKPOINT:
            duty: duties_pb2.Duty = reply.duty
            return duty
        report = duties_pb2.ReportDutyRequest(
            request_id=reply.duty.duty_id,
            duty_id=reply.duty.duty_id,
            fence=reply.duty.fence,
            evaluation=duties_pb2.Evaluation(
                incarnation=1,
                state_digest=common_pb2.Attestation.FromString(attestation.payload).state_digest,
                total_nats=100.0,
                num_tokens=50,
                num_bytes=120,
            ),
        )
        first = await client.call("Duties", "ReportDuty", report)
        assert first == await client.call("Duties", "ReportDuty", report)
        return None

    found = await eventually(probe)
    assert isinstance(found, duties_pb2.Duty)
    return found


async def upload(client: Client, header: duties_pb2.CheckpointHeader, data: bytes) -> Any:
    """Upload in parts of 100 kB."""

    async def parts() -> AsyncIterator[duties_pb2.UploadCheckpointRequest]:
        yield duties_pb2.UploadCheckpointRequest(header=header)
        for begin in range(0, len(data), 100_000):
            yield duties_pb2.UploadCheckpointRequest(data=data[begin : begin + 100_000])

    try:
        return await client.stub("Duties").UploadCheckpoint(
            parts(), metadata=client.metadata("Duties", "UploadCheckpoint"), timeout=20.0
        )
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error
