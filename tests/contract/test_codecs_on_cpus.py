"""Codecs give the same bits on every CPU."""

import os
import subprocess
import sys

import pytest

from tests.contract.codec_digest import codec_digest

GOLDEN = "1e958d13e57a17c3316c50ca3ba07872855283939d81d17e788ba62e9e2c7ffe"
AVX512 = "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR"
ALL_ABOVE_SSE3 = f"SSSE3 SSE41 POPCNT SSE42 AVX F16C FMA3 AVX2 {AVX512}"


def test_bits_on_this_cpu_are_golden() -> None:
    assert codec_digest() == GOLDEN


@pytest.mark.parametrize("disabled", [AVX512, ALL_ABOVE_SSE3])
def test_bits_without_newer_instructions_are_the_same(disabled: str) -> None:
    environment = dict(
        os.environ, NPY_DISABLE_CPU_FEATURES=disabled, PYTHONPATH=os.pathsep.join(sys.path)
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.contract.codec_digest"],
        env=environment,
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout.strip() == GOLDEN
