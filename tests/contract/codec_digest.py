"""Prints a digest of everything that the codecs make of one fixed vector, as this CPU computes it.

Run as a program under NPY_DISABLE_CPU_FEATURES to compute it as a lesser CPU would.
"""

import hashlib

import numpy as np

from protos.contract.codecs_wire import CODEC_NAMES, codec_named
from protos.contract.digest import Float32Vector


def spread_vector(num_values: int = 70_001) -> Float32Vector:
    """Values of both signs and of magnitudes from 2^-140 to 2^127, made of integers."""
    state = np.arange(num_values, dtype=np.uint64) * np.uint64(0x9E37_79B9_7F4A_7C15)
    state ^= state >> np.uint64(29)
    state *= np.uint64(0xBF58_476D_1CE4_E5B9)
    bits = (state >> np.uint64(32)).astype(np.uint32)
    exponents = np.where(np.arange(num_values) < 50_000, 100 + (bits >> 23) % 16, bits >> 23 & 255)
    exponents = np.minimum(exponents, 254).astype(np.uint32)
    return (bits & np.uint32(0x807F_FFFF) | exponents << np.uint32(23)).view(np.float32)


def codec_digest() -> str:
    """SHA-256 over all encodings of the vector and over what they are decoded to."""
    whole = hashlib.sha256()
    vector = spread_vector()
    for codec in (*map(codec_named, CODEC_NAMES), codec_named("sparse").for_result(3)):
        data = codec.encode(vector)
        decoded = np.empty_like(vector)
        codec.decode(data, decoded)
        whole.update(data)
        whole.update(decoded.data)
    return whole.hexdigest()


if __name__ == "__main__":
    print(codec_digest())
