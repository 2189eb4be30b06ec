"""The hand-written step against autograd: same loss, same gradients, every model variant, objective
mask, thread count and precision.
"""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from peer.model import kernels as kernels_module
from peer.model.decoder import Decoder, FlatParameters
from peer.model.kernels import BuiltKernels, Kernels, find_kernels
from peer.model.loss import examples_on, summed_loss
from peer.model.masks import attention_mask
from peer.model.native import NativeDecoder
from peer.model.objectives import IGNORED, ExampleBuilder
from protos.contract.run_spec import OBJECTIVES, ModelSpec, ObjectiveSpec
from tests.peer.model.tiny import BASE, VARIANTS, random_windows

TWO_BLOCKS = replace(
    BASE,
    seq_len=256,
    d_model=40,
    head_dim=6,
    vocab_size=300,
    num_layers=1,
    has_tied_embeddings=False,
)


def build(spec: ModelSpec) -> tuple[Decoder, FlatParameters]:
    """A model whose every parameter has a real gradient."""
    model = Decoder(spec)
    flat = FlatParameters(model)
    generator = torch.Generator().manual_seed(11)
    flat.values.copy_(0.2 * torch.randn(flat.values.numel(), generator=generator) + 0.05)
    return model, flat


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the kernels of this module's tests are."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def built(kept: Path) -> BuiltKernels:
    found = find_kernels(kept)
    assert found, found.reason
    return found


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def reference(
    model: Decoder,
    flat: FlatParameters,
    batch: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    *,
    is_bf16: bool = False,
) -> tuple[float, Tensor]:
    inputs_BT, labels_BT, weights_B, mask = batch
    flat.grads.zero_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
        loss = summed_loss(model(inputs_BT, mask=mask), labels_BT, weights_B)
    loss.backward()
    return loss.item(), flat.grads.clone()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def run_native(
    model: Decoder,
    flat: FlatParameters,
    batch: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    built: BuiltKernels,
    dtype: torch.dtype,
) -> tuple[float, Tensor]:
    flat.grads.fill_(torch.nan)  # every value must be written
    nats = NativeDecoder(model, flat, Kernels(built, dtype)).run(*batch)
    return nats, flat.grads.clone()


def plain_batch(spec: ModelSpec) -> tuple[Tensor, Tensor, None, None]:
    return (*random_windows(spec, num_windows=3), None, None)


@pytest.mark.parametrize("spec", [*VARIANTS.values(), TWO_BLOCKS], ids=[*VARIANTS, "two-blocks"])
def test_fp32_gradients_are_those_of_autograd(spec: ModelSpec, built: BuiltKernels) -> None:
    model, flat = build(spec)
    batch = plain_batch(spec)
    nats, grads = reference(model, flat, batch)
    found_nats, found = run_native(model, flat, batch, built, torch.float32)
    assert found_nats == pytest.approx(nats, rel=1e-6)
    assert relative_error(found, grads) < 5e-6


@pytest.mark.parametrize("spec", [BASE, TWO_BLOCKS], ids=["one-block", "two-blocks"])
def test_bf16_is_as_exact_as_autocast(spec: ModelSpec, built: BuiltKernels) -> None:
    model, flat = build(spec)
    batch = plain_batch(spec)
    nats, grads = reference(model, flat, batch)
    _, autocast_grads = reference(model, flat, batch, is_bf16=True)
    found_nats, found = run_native(model, flat, batch, built, torch.bfloat16)
    assert found_nats == pytest.approx(nats, rel=2e-3)
    assert relative_error(found, grads) < 1.2 * relative_error(autocast_grads, grads)


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("num_windows", [1, 3])
@pytest.mark.parametrize(("d_model", "d_ff"), [(256, 320), (48, 66)])
def test_what_lies_behind_a_row_does_not_matter(
    d_model: int, d_ff: int, num_windows: int, built: BuiltKernels, nan_memory: None
) -> None:
    """bf16 products on AMX read it where the tokens are no multiple of 32."""
    spec = replace(BASE, seq_len=50, d_model=d_model, d_ff=d_ff, vocab_size=400, num_layers=1)
    model, flat = build(spec)
    batch = (*random_windows(spec, num_windows=num_windows), None, None)
    _, grads = reference(model, flat, batch)
    _, autocast_grads = reference(model, flat, batch, is_bf16=True)
    _, found = run_native(model, flat, batch, built, torch.bfloat16)
    assert relative_error(found, grads) < 1.2 * relative_error(autocast_grads, grads)


def test_a_transposed_matrix_has_zeros_behind_its_rows(built: BuiltKernels) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        matrix, out = torch.randn(37, 50).to(dtype), torch.full((50, 69), torch.nan, dtype=dtype)
        Kernels(built, dtype)("transpose", matrix, out, 37, 50, 69)
        assert torch.equal(out[:, :37], matrix.t()) and not out[:, 37:].any()


def test_nan_stays_nan_in_bf16(built: BuiltKernels) -> None:
    bits = [0xFFFFFFFF, 0x7FFFFFFF, 0x7F800001, 0xFFC00000, 0x7F800000, 0xFF7FFFFF, 0x3F808000]
    values = torch.from_numpy(np.array(bits * 9, dtype=np.uint32).view(np.float32))
    found = torch.empty(values.shape, dtype=torch.bfloat16)
    Kernels(built, torch.bfloat16)("cast", values, found, values.numel(), 1)
    assert torch.equal(found.isnan(), values.isnan())
    assert torch.equal(found.nan_to_num(7.0), values.bfloat16().nan_to_num(7.0))


def test_no_more_positions_than_the_model_has(built: BuiltKernels) -> None:
    model, flat = build(BASE)
    tokens_BT = torch.zeros((1, BASE.seq_len + 1), dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        with pytest.raises(AssertionError):
            NativeDecoder(model, flat, Kernels(built, dtype)).run(tokens_BT, tokens_BT, None, None)


def test_logits_in_pieces_add_up(built: BuiltKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.model.native.LOGITS_BYTES", 1)
    model, flat = build(TWO_BLOCKS)  # 768 tokens: six pieces of 128
    batch = plain_batch(TWO_BLOCKS)
    nats, grads = reference(model, flat, batch)
    for dtype, tolerance in ((torch.float32, 5e-6), (torch.bfloat16, 3e-2)):
        found_nats, found = run_native(model, flat, batch, built, dtype)
        assert found_nats == pytest.approx(nats, rel=max(1e-6, tolerance / 10))
        assert relative_error(found, grads) < tolerance


def test_masks_weights_and_labels_that_are_not_predicted(built: BuiltKernels) -> None:
    model, flat = build(BASE)
    inputs_BT, labels_BT = random_windows(BASE, num_windows=3)
    labels_BT[0, :5] = IGNORED
    weights_B = torch.tensor([2.0, 1.0, 0.5])
    documents_BT = (torch.arange(BASE.seq_len) > 6).long().expand(3, -1)
    for mask in (
        attention_mask(BASE.seq_len, prefix_B=torch.tensor([3, 12, 1])),
        attention_mask(BASE.seq_len, documents_BT=documents_BT),
        attention_mask(BASE.seq_len),
    ):
        batch = inputs_BT, labels_BT, weights_B, mask
        nats, grads = reference(model, flat, batch)
        found_nats, found = run_native(model, flat, batch, built, torch.float32)
        assert found_nats == pytest.approx(nats, rel=1e-6)
        assert relative_error(found, grads) < 5e-6


def test_threads_share_the_rows(built: BuiltKernels, two_threads: None) -> None:
    model, flat = build(TWO_BLOCKS)
    batch = plain_batch(TWO_BLOCKS)
    nats, grads = reference(model, flat, batch)
    found_nats, found = run_native(model, flat, batch, built, torch.float32)
    assert found_nats == pytest.approx(nats, rel=1e-6)
    assert relative_error(found, grads) < 5e-6


def test_what_is_not_finite_is_seen(built: BuiltKernels) -> None:
    model, flat = build(BASE)
    batch = plain_batch(BASE)
    for name in ("layers.1.mlp.w1", "tok_embeddings", "norm"):
        before = flat.values.clone()
        model.get_submodule(name).weight.data.fill_(torch.nan)
        for dtype in (torch.float32, torch.bfloat16):
            nats, _ = run_native(model, flat, batch, built, dtype)
            assert nats != nats, f"{name} {dtype}"
        flat.values.copy_(before)


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (33, 64), (70, 47), (128, 300)])
def test_transposes(shape: tuple[int, int], built: BuiltKernels) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = Kernels(built, dtype)
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        out = torch.zeros(shape[1], shape[0] + 5, dtype=dtype)
        call("transpose", matrix, out, *shape, shape[0] + 5)
        assert torch.equal(out[:, : shape[0]], matrix.t()) and not out[:, shape[0] :].any()
        wide = torch.ones(shape[1], shape[0])
        call("widen_transposed", matrix, wide, *shape, 1)
        assert torch.equal(wide, 1.0 + matrix.t().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_batch_gives_the_same_bits(
    dtype: torch.dtype, built: BuiltKernels, two_threads: None
) -> None:
    model, flat = build(TWO_BLOCKS)
    batch = plain_batch(TWO_BLOCKS)
    nats, grads = run_native(model, flat, batch, built, dtype)
    for _ in range(3):
        again_nats, again = run_native(model, flat, batch, built, dtype)
        assert again_nats == nats and torch.equal(again, grads)


@pytest.mark.parametrize("has_document_mask", [False, True], ids=["all", "documents"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective(name: str, has_document_mask: bool, built: BuiltKernels) -> None:
    spec = replace(BASE, seq_len=32, vocab_size=71)
    objective = ObjectiveSpec(name=name, has_document_mask=has_document_mask)
    builder = ExampleBuilder(objective, seed=3, num_text_tokens=60, eos_token_id=0)
    tokens = np.random.default_rng(5).integers(0, 60, (3, 33))
    tokens[:, [0, 9, 20]] = 0
    examples = builder.build(tokens[:, :-1], tokens[:, 1:], [(0, 0, i) for i in range(3)])
    batch = examples_on(examples, torch.device("cpu"))
    model, flat = build(spec)
    nats, grads = reference(model, flat, batch)
    _, autocast_grads = reference(model, flat, batch, is_bf16=True)
    found_nats, found = run_native(model, flat, batch, built, torch.float32)
    assert found_nats == pytest.approx(nats, rel=1e-6)
    assert relative_error(found, grads) < 5e-6
    _, found = run_native(model, flat, batch, built, torch.bfloat16)
    assert relative_error(found, grads) < 1.2 * relative_error(autocast_grads, grads)


def test_a_label_that_is_no_token_is_not_finite(built: BuiltKernels) -> None:
    model, flat = build(BASE)
    inputs_BT, labels_BT = random_windows(BASE, num_windows=2)
    labels_BT[1, 3] = BASE.vocab_size
    nats, _ = run_native(model, flat, (inputs_BT, labels_BT, None, None), built, torch.float32)
    assert nats != nats


def test_small_numbers_are_not_flushed(built: BuiltKernels) -> None:
    """Some compilers' fast mathematics switch that on for the whole process at loading."""
    assert built and np.float32(1e-40) * np.float32(0.5) > 0 and (torch.tensor(1e-40) * 0.5) > 0


# Building.


@pytest.fixture
def fake(
    built: BuiltKernels, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    """Has a script take the compiler's place; the word COPY gives what the real one has built."""
    copy = (
        f'case "$*" in *MUSTER_FP32*) k=float32;; *) k=bfloat16;; esac; '
        f'while [ "$1" != -o ]; do shift; done; cp {kept}/*-$k.so "$2"'
    )

    def install(script: str) -> Path:
        path = tmp_path / "fake-cc"
        path.write_text("#!/bin/sh\n" + script.replace("COPY", copy) + "\n")
        path.chmod(0o755)
        monkeypatch.setattr(kernels_module, "COMPILERS", (str(path),))
        return tmp_path / "cache"

    return install


def test_a_second_start_builds_nothing(fake: Callable[[str], Path]) -> None:
    cache = fake('echo x >> "$(dirname "$0")/calls"; COPY')
    first, again = find_kernels(cache), find_kernels(cache)
    assert first and again and first.key == again.key
    assert (cache.parent / "calls").read_text() == "x\n" * 2, "one library for each dtype"
    assert len(list(cache.iterdir())) == 2


def test_what_is_kept_and_broken_is_built_again(fake: Callable[[str], Path]) -> None:
    cache = fake("COPY")
    cache.mkdir(mode=0o700)
    for name in kernels_module._file_names(
        kernels_module._key(kernels_module.COMPILERS[0])
    ).values():
        (cache / name).write_bytes(b"half of it")
    found = find_kernels(cache)
    assert found and "cannot be loaded" in found.reason
    again = find_kernels(cache)
    assert again and "cannot be loaded" not in again.reason


def test_another_processor_or_source_builds_anew(
    fake: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = fake("COPY")
    keys = {find_kernels(cache).key}
    monkeypatch.setattr(kernels_module, "_processor", lambda: "another one")
    keys.add(find_kernels(cache).key)
    source = tmp_path / "kernels.c"
    source.write_text("/* newer */")
    monkeypatch.setattr(kernels_module, "SOURCE", source)
    keys.add(find_kernels(cache).key)
    assert len(keys) == 3 and len(list(cache.iterdir())) == 6


def test_builders_of_one_directory_do_not_disturb_each_other(fake: Callable[[str], Path]) -> None:
    cache = fake("COPY")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(find_kernels, [cache] * 4))
    assert all(found) and len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo kaputt >&2; exit 3", "ended with 3: kaputt"),
        ('while [ "$1" != -o ]; do shift; done; echo no library > "$2"', "file too short"),
        ("TRAP", "dies of SIG"),
        ("WRONG", "wrong numbers (check 4)"),
    ],
    ids=["fails", "writes-rubbish", "illegal-instruction", "wrong-numbers"],
)
def test_a_broken_compiler_is_named(
    script: str, reason: str, fake: Callable[[str], Path], tmp_path: Path
) -> None:
    real = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))
    body = {"TRAP": "__builtin_trap();", "WRONG": "return 4;"}.get(script)
    if body is not None:
        (tmp_path / "bad.c").write_text(f"int muster_check(void) {{ {body} }}")
        script = f'while [ "$1" != -o ]; do shift; done; {real} -shared {tmp_path}/bad.c -o "$2"'
    cache = fake(script)
    found = find_kernels(cache)
    assert not found and "cannot be built" in found.reason and reason in found.reason
    assert not list(cache.glob("*")), "nothing is kept, nothing is left behind"


def test_a_cache_that_cannot_be_written_is_named(fake: Callable[[str], Path]) -> None:
    cache = fake("COPY")
    cache.write_text("a file where the directory should be")
    found = find_kernels(cache)
    assert found and "not kept" in found.reason


def test_without_a_compiler_the_reason_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels_module, "COMPILERS", ("no-such-compiler",))
    found = find_kernels(tmp_path)
    assert not found and "no-such-compiler" in found.reason
