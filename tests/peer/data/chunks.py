"""A chunk on disk, leases over it, and windows that say who they are."""

import hashlib
from pathlib import Path

import numpy as np

from peer.data.reader import LeasedRange
from peer.model.objectives import ExampleBuilder, Examples
from protos.contract.run_spec import ObjectiveSpec
from protos.muster.v1 import common_pb2

SEQ_LEN = 4
VOCAB_SIZE = 1_000


def write_chunk(folder: Path, *, num_tokens: int = 41, first: int = 0) -> Path:
    """A chunk with the tokens first, first + 1, ..., named by its digest."""
    data = np.arange(first, first + num_tokens, dtype="<u2").tobytes()
    path = folder / hashlib.sha256(data).hexdigest()
    path.write_bytes(data)
    return path


def signed_lease(path: Path, *, lease_number: int, begin: int, end: int, chunk: int = 3) -> bytes:
    """A serialised Signed Lease; the signature is the daemon's business."""
    window_range = common_pb2.WindowRange(
        data_pass=1, chunk_index=chunk, begin_window=begin, end_window=end
    )
    lease = common_pb2.Lease(
        lease_number=lease_number, range=window_range, chunk_digest=bytes.fromhex(path.name)
    )
    return common_pb2.Signed(payload=lease.SerializeToString()).SerializeToString()


def made_up_lease(lease_number: int, begin: int, end: int) -> LeasedRange:
    """A lease for a feed whose windows come from `numbered_windows`."""
    return LeasedRange(
        lease=b"lease %d" % lease_number,
        lease_number=lease_number,
        data_pass=0,
        chunk_index=lease_number,
        begin_window=begin,
        end_window=end,
        chunk_digest=b"",
        path=Path("nowhere"),
    )


def causal_builder() -> ExampleBuilder:
    """Builder of examples that predict the next token."""
    return ExampleBuilder(ObjectiveSpec(), seed=7, num_text_tokens=VOCAB_SIZE, eos_token_id=-1)


def numbered_windows(leased: LeasedRange, begin: int, end: int) -> Examples:
    """Windows whose inputs are the lease number and whose labels are the window's index."""
    windows_B1 = np.arange(begin, end, dtype=np.int64)[:, None]
    inputs_BT = np.full((end - begin, SEQ_LEN), leased.lease_number, dtype=np.int64)
    return Examples(inputs_BT=inputs_BT, labels_BT=np.repeat(windows_B1, SEQ_LEN, axis=1))
