"""Batches of encoded pieces on a part stream, or the reason why there will be no more.

Sizes follow from the codec, so a batch is: one byte 1, for reduced pieces the SHA-256 of each, then
the pieces' bytes. A refusal is: one byte 0, u32 length, UTF-8 text. While a reducer waits for
somebody else it says so, by one byte 2 at a time, so that it is not taken for stopped. A member's
own pieces travel without digests: it committed to them when it joined.
"""

from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

from peer.swarm.bulk_stream import BulkStream, StreamError
from peer.swarm.codecs import EncodedVector, piece_bounds
from peer.swarm.slice_sum import Batch
from protos.contract.codecs_wire import Codec
from protos.contract.digest import Float32Vector, piece_digest

_DIGEST_BYTES = 32
_MAX_REASON_BYTES = 2000
_REFUSAL, _PIECES, _WAITING = b"\0", b"\1", b"\2"
_WAITING_SECONDS = 0.3
"""Between two bytes that say that a reducer waits."""


class Refused(Exception):
    """The other side gives the attempt up, with its reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason[:_MAX_REASON_BYTES])


def send_batch(
    stream: BulkStream,
    encoded: EncodedVector,
    batch: Batch,
    digests: Sequence[bytes] = (),
    *,
    on_moved: Callable[[], None],
) -> None:
    """Send one batch; tells `on_moved` of every piece. Raises StreamError."""
    stream.send(_PIECES + b"".join(digests))
    for piece in range(batch.begin_piece, batch.end_piece):
        stream.send(encoded.run(piece, piece + 1))
        on_moved()


def send_refusal(stream: BulkStream, reason: str) -> None:
    """Say why no more batches follow. Raises StreamError."""
    text = reason.encode()[:_MAX_REASON_BYTES]
    stream.send(_REFUSAL + len(text).to_bytes(4, "big") + text)


def next_summed(summed: "SimpleQueue[Batch | None]", stream: BulkStream) -> Batch | None:
    """Wait for the next batch to send, and let the receiver know that we do. Raises StreamError."""
    while True:
        try:
            return summed.get(timeout=_WAITING_SECONDS)
        except Empty:
            stream.send(_WAITING)


def read_mark(stream: BulkStream, on_waiting: Callable[[bool], None] = lambda _: None) -> None:
    """Read what a batch begins with; tells `on_waiting` whether the other side waits itself.

    Raises Refused with the other side's reason, StreamError.
    """
    while (mark := bytes(stream.read_bytes(1))) == _WAITING:
        on_waiting(True)
    on_waiting(False)
    if mark == _REFUSAL:
        length = int.from_bytes(stream.read_bytes(4), "big")
        text = stream.read_bytes(min(length, _MAX_REASON_BYTES))
        raise Refused(text.decode(errors="replace"))
    if mark != _PIECES:
        raise StreamError(f"a batch begins with {mark!r}")


def read_digests(stream: BulkStream, batch: Batch) -> list[bytes]:
    """Digests of a reduced batch. Raises StreamError."""
    size = batch.end_piece - batch.begin_piece
    hashes = bytes(stream.read_bytes(_DIGEST_BYTES * size))
    return [hashes[i : i + _DIGEST_BYTES] for i in range(0, len(hashes), _DIGEST_BYTES)]


def read_pieces(
    stream: BulkStream,
    batch: Batch,
    digests: Sequence[bytes],
    views: Sequence[memoryview],
    *,
    on_moved: Callable[[], None],
) -> None:
    """Read a batch's pieces into `views` and hold each against its digest; tells `on_moved` of
    every piece.

    Raises StreamError, and ValueError naming the piece that differs.
    """
    for piece, digest, view in zip(
        range(batch.begin_piece, batch.end_piece), digests, views, strict=True
    ):
        stream.read_into(view)
        if piece_digest(view) != digest:
            raise ValueError(f"piece {piece} is not what was committed to")
        on_moved()


def read_part(
    stream: BulkStream,
    codec: Codec,
    batch: Batch,
    digests: Sequence[bytes],
    values: Float32Vector,
    *,
    on_moved: Callable[[], None],
) -> None:
    """Read, check and decode a batch of a member's own pieces into `values`, which it fills.

    A plain codec's bytes arrive in `values` themselves, and the sum finds what is not finite.
    Raises StreamError, Refused, ValueError, CorruptDataError.
    """
    read_mark(stream)
    bounds = [piece_bounds(i, i + 1, values.size) for i in range(len(digests))]
    if codec.name == "fp32":
        data = values.data.cast("B")
    else:
        data = memoryview(bytearray(codec.encoded_bytes(values.size)))
    views = [data[codec.encoded_bytes(low) : codec.encoded_bytes(high)] for low, high in bounds]
    read_pieces(stream, batch, digests, views, on_moved=on_moved)
    if codec.name != "fp32":
        codec.decode(data, values)
