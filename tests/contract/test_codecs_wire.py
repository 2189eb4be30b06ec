"""Codecs: golden bytes, sizes, refusals."""

import numpy as np
import pytest

from protos.contract import codecs_wire
from protos.contract.errors import CorruptDataError, UsageError

VALUES = np.array([0.0, -1.0, 1.5, 3.4028235e38, 1e-45], dtype=np.float32)
GOLDEN_FP32 = "00000000000080bf0000c03fffff7f7f01000000"


def test_fp32_bytes_are_golden() -> None:
    assert codecs_wire.encode("fp32", VALUES).hex() == GOLDEN_FP32
    assert codecs_wire.encoded_bytes("fp32", VALUES.size) == len(GOLDEN_FP32) // 2


def test_fp32_keeps_every_bit() -> None:
    decoded = codecs_wire.decode("fp32", bytes.fromhex(GOLDEN_FP32), VALUES.size)
    assert decoded.tobytes() == VALUES.tobytes()
    assert codecs_wire.encode("fp32", VALUES[::2]) == VALUES[::2].tobytes()


def test_unknown_codec_is_refused_with_what_is_known() -> None:
    for call in (
        lambda: codecs_wire.encode("int8", VALUES),
        lambda: codecs_wire.decode("int8", b"", 0),
        lambda: codecs_wire.encoded_bytes("int8", 1),
    ):
        with pytest.raises(UsageError, match="'int8'; known codecs: fp32"):
            call()


def test_wrong_size_and_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CorruptDataError, match="7 bytes of codec fp32; 8 bytes for 2 values"):
        codecs_wire.decode("fp32", b"1234567", 2)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(CorruptDataError, match="not finite"):
            codecs_wire.decode("fp32", np.array([bad], dtype="<f4").tobytes(), 1)
