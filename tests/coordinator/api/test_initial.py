"""`run create --init`: the imported model is checked, kept, named by the spec and served."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from coordinator.cli.initial import keep_initial, read_initial
from coordinator.cli.spec_options import build_spec
from coordinator.operations.admin import create_run
from coordinator.operations.requests_admin import CreateTokenRequest
from coordinator.operations.tokens import create_token
from protos.contract.channel import JoinString
from protos.contract.errors import CorruptDataError, UsageError
from protos.contract.initial_file import (
    VECTOR,
    InitialHeader,
    file_digest,
    initial_path,
    is_initial_file,
    read_initial_header,
)
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import RunSpec
from protos.muster.v1 import corpus_pb2
from tests.coordinator.loopback import (
    create_run_request,
    deployed,
    open_client,
    tiny_spec,
    write_dataset,
)


def write_initial(folder: Path, spec: RunSpec, tokenizer_digest: str) -> tuple[Path, InitialHeader]:
    """Written by another library than ours."""
    folder.mkdir()
    header = InitialHeader(
        model=spec.model, tokenizer_digest=tokenizer_digest, eos_token_id=0, origin="test"
    )
    values = np.arange(ModelShape.from_spec(spec.model).num_parameters, dtype=np.float32)
    path = folder / "initial.safetensors"
    save_file({VECTOR: values}, path, header.to_metadata())
    return path, header


def test_the_file_brings_its_model_and_is_refused_for_other_tokens(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "dataset")
    path, header = write_initial(tmp_path / "in", tiny_spec(manifest), manifest.tokenizer_digest)
    assert is_initial_file(path) and read_initial_header(path) == header
    initial = read_initial(tmp_path / "in", manifest)
    settings = ["strategy.global_batch_tokens=64", "model.seq_len=4"]
    spec = build_spec(manifest, settings=settings, initial=initial)
    assert spec.initial_digest == file_digest(path) == initial.digest
    assert spec.model == replace(header.model, seq_len=4)
    with pytest.raises(UsageError, match="--init"):
        build_spec(manifest, settings=settings, model=["tiny"], initial=initial)
    with pytest.raises(UsageError, match="d_ff = 16") as refused:
        build_spec(manifest, settings=[*settings, "model.d_ff=16"], initial=initial)
    assert "d_ff = 8" in refused.value.allowed
    other = replace(manifest, tokenizer_digest="0" * 64)
    with pytest.raises(UsageError, match="tokenizer") as refused:
        read_initial(path, other)
    assert "corpus build --tokenizer" in refused.value.remedy
    path.write_bytes(path.read_bytes()[:40])
    assert not is_initial_file(path)
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="transformers' form") as refused:
        read_initial(exported, manifest)
    assert f"`muster-peer import {exported} DIR`" in refused.value.remedy
    with pytest.raises(CorruptDataError):
        read_initial(path, manifest)


def test_a_member_gets_the_very_bytes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deployed(tmp_path) as deployment:
            plain = create_run_request(deployment.manifest)
            path, _ = write_initial(
                tmp_path / "in",
                tiny_spec(deployment.manifest),
                deployment.manifest.tokenizer_digest,
            )
            digest = file_digest(path)
            spec = replace(tiny_spec(deployment.manifest), initial_digest=digest)
            request = replace(plain, run_id="further", spec=spec.to_wire())
            with pytest.raises(UsageError, match="not in the data directory"):
                await deployment.coordinator.perform(create_run, request)
            keep_initial(tmp_path / "in", digest, deployment.data_dir)
            kept = deployment.data_dir / initial_path(digest)
            assert kept.read_bytes() == path.read_bytes()
            wider = replace(spec, model=replace(spec.model, d_ff=16))
            with pytest.raises(UsageError, match="d_ff"):
                await deployment.coordinator.perform(
                    create_run, replace(request, spec=wider.to_wire())
                )
            await deployment.coordinator.perform(create_run, request)
            token = await deployment.coordinator.perform(
                create_token,
                CreateTokenRequest(run_id="further", max_uses=0, expire_after_seconds=600.0),
            )
            join_string = JoinString(
                address=deployment.coordinator.local_address,
                ca_fingerprint=deployment.coordinator.ca_fingerprint,
                run_id="further",
                secret=token.secret.hex(),
                expire_unix_seconds=token.expire_unix_seconds,
            )
            wanted = corpus_pb2.FetchFileRequest(file=corpus_pb2.DATASET_FILE_INITIAL_STATE)
            async with open_client(join_string) as client:
                joined = await client.join()
                assert json.loads(joined.run_spec)["initial_digest"] == digest
                parts = await client.stream("Corpus", "FetchFile", wanted)
                assert b"".join(part.data for part in parts) == path.read_bytes()
                kept.write_bytes(b"damaged")
                with pytest.raises(CorruptDataError, match="restores|restored|digest"):
                    await client.stream("Corpus", "FetchFile", wanted)
            async with deployment.client(1) as stranger:
                with pytest.raises(UsageError):
                    await stranger.stream("Corpus", "FetchFile", wanted)

    asyncio.run(scenario())
