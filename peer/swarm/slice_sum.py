"""The reducer's part: takes in the members' pieces of one run in step, and sums them in member
order.

Every sender has a few slots; a thread per sender fills them, one thread sums batch after batch as
soon as all have it. So memory is bounded, a fast sender waits for the slowest, and the sum
float32(w_i / W) * x_i, each operation rounded on its own, does not depend on who was first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from peer.swarm.buffer_pool import BufferPool
from peer.swarm.codecs import EncodedVector, piece_bounds
from protos.contract.codecs_wire import Codec
from protos.contract.digest import PIECE_VALUES, Float32Vector, num_pieces, piece_digest
from protos.contract.errors import CorruptDataError

BATCH_PIECES = 4
"""Pieces moved at a time: 1 MiB of fp32, so that a hand-over between threads costs little beside
it.
"""
_BATCH_VALUES = BATCH_PIECES * PIECE_VALUES
_BUFFER_BYTES = 32 * 2**20
_MAX_SLOTS = 8


class Stopped(Exception):
    """The reduction has failed elsewhere; whoever waits gives up quietly."""


class NotFinite(Exception):
    """A member's pieces, or the sum of all, hold values that are not finite; `peer_id` empty for
    the sum.
    """

    def __init__(self, piece: int, peer_id: str) -> None:
        super().__init__(f"piece {piece} holds values that are not finite")
        self.peer_id = peer_id


@dataclass(frozen=True, slots=True)
class Batch:
    """A few consecutive pieces."""

    begin_piece: int
    end_piece: int


def batches_of(begin_piece: int, end_piece: int) -> list[Batch]:
    """Batches of a run of pieces, in order."""
    return [
        Batch(begin, min(begin + BATCH_PIECES, end_piece))
        for begin in range(begin_piece, end_piece, BATCH_PIECES)
    ]


class SenderSlots:
    """Room for a few decoded batches of one sender."""

    def __init__(self, num_slots: int, buffers: BufferPool) -> None:
        self._free: SimpleQueue[Float32Vector | None] = SimpleQueue()
        self._filled: SimpleQueue[Float32Vector | None] = SimpleQueue()
        for _ in range(num_slots):
            self._free.put(buffers.take(4 * _BATCH_VALUES).view(np.float32))

    def take_free(self) -> Float32Vector:
        """Wait for room."""
        return _unless_stopped(self._free.get())

    def put_filled(self, values: Float32Vector) -> None:
        """The next batch is here, checked."""
        self._filled.put(values)

    def take_filled(self) -> Float32Vector:
        """Wait for the next batch."""
        return _unless_stopped(self._filled.get())

    def put_free(self, values: Float32Vector) -> None:
        """The batch is summed."""
        self._free.put(values)

    def stop(self) -> None:
        """Wake everybody who waits."""
        self._free.put(None)
        self._filled.put(None)


def _unless_stopped(values: Float32Vector | None) -> Float32Vector:
    if values is None:
        raise Stopped
    return values


class ResultBuffer:
    """The averaged vector's encoded bytes, filled piece by piece in any order, each once."""

    def __init__(self, codec: Codec, num_values: int, buffers: BufferPool) -> None:
        self.codec, self.num_values = codec, num_values
        self._bytes = buffers.take(codec.encoded_bytes(num_values))
        self.encoded = EncodedVector(codec=codec, num_values=num_values, data=self._bytes.data)
        self.digests: list[bytes] = [b""] * num_pieces(num_values)
        self.is_plain = codec.name == "fp32"

    def values_of(self, piece: int, scratch: Float32Vector) -> Float32Vector:
        """Where the fp32 values of a piece may be written: in place if the codec is plain."""
        low, high = piece_bounds(piece, piece + 1, self.num_values)
        if self.is_plain:
            return self._bytes[4 * low : 4 * high].view("<f4")
        return scratch[: high - low]

    def put(self, piece: int, values: Float32Vector) -> None:
        """Encode a piece once and remember its digest. Raises CorruptDataError if not finite."""
        target = self.encoded.run(piece, piece + 1)
        if not self.is_plain:
            target[:] = self.codec.encode(values)
        elif not np.isfinite(np.add.reduce(values)):
            self.codec.encode(values)  # raises if it is not the sum alone that overflows
        self.digests[piece] = piece_digest(target)

    def check(self, piece: int, scratch: Float32Vector) -> None:
        """Raise CorruptDataError unless the bytes of a piece that came from elsewhere decode.

        A finite sum of plain values has finite terms; only another one needs a closer look.
        """
        values = self.values_of(piece, scratch)
        if not self.is_plain or not np.isfinite(np.add.reduce(values)):
            self.encoded.decode_run(piece, piece + 1, scratch[: values.size])


class SliceSum:
    """Sum of one run of pieces; `run` is one thread's work, the slots are filled by others."""

    def __init__(
        self,
        *,
        run: tuple[int, int],
        members: Sequence[str],
        weight_by_peer: Mapping[str, np.float32],
        own_peer_id: str,
        own: EncodedVector | None,
        result: ResultBuffer,
        buffers: BufferPool,
    ) -> None:
        """`members` bring values and are summed in this order; `own` is this member's part."""
        self.batches = batches_of(*run)
        self._members = tuple(members)
        self._weight_by_peer, self._own_peer_id, self._own = weight_by_peer, own_peer_id, own
        self._result = result
        senders = [peer for peer in members if peer != own_peer_id]
        per_sender = _BUFFER_BYTES // (4 * _BATCH_VALUES) // max(1, len(senders))
        num_slots = min(max(2, per_sender), _MAX_SLOTS, max(1, len(self.batches)))
        self.slots = {peer: SenderSlots(num_slots, buffers) for peer in senders}
        self._readers: list[SimpleQueue[Batch | None]] = []

    def follow(self) -> "SimpleQueue[Batch | None]":
        """Queue of summed batches for one receiver; call before `run`."""
        queue: SimpleQueue[Batch | None] = SimpleQueue()
        self._readers.append(queue)
        return queue

    def stop(self) -> None:
        """Wake everybody who waits, with `Stopped`."""
        for slots in self.slots.values():
            slots.stop()
        for reader in self._readers:
            reader.put(None)

    def run(self) -> None:
        """Sum all batches. Raises NotFinite, Stopped."""
        scratch = np.empty((3, PIECE_VALUES), dtype=np.float32)
        for batch in self.batches:
            filled = {peer: slots.take_filled() for peer, slots in self.slots.items()}
            for index, piece in enumerate(range(batch.begin_piece, batch.end_piece)):
                begin = index * PIECE_VALUES
                self._sum_piece(
                    piece, {p: v[begin : begin + PIECE_VALUES] for p, v in filled.items()}, scratch
                )
            for peer, slots in self.slots.items():
                slots.put_free(filled[peer])
            for reader in self._readers:
                reader.put(batch)

    def _sum_piece(
        self, piece: int, filled: dict[str, Float32Vector], scratch: npt.NDArray[np.float32]
    ) -> None:
        total = self._result.values_of(piece, scratch[0])
        by_peer = {peer: values[: total.size] for peer, values in filled.items()}
        if self._own is not None:
            by_peer[self._own_peer_id] = self._own_values(piece, scratch[1][: total.size])
        weighted = total
        for number, peer in enumerate(self._members):
            np.multiply(by_peer[peer], self._weight_by_peer[peer], out=weighted)
            if number > 0:
                np.add(total, weighted, out=total)
            weighted = scratch[2][: total.size]
        try:
            self._result.put(piece, total)
        except CorruptDataError as error:
            culprits = [peer for peer, v in by_peer.items() if not np.isfinite(v).all()]
            raise NotFinite(piece, culprits[0] if culprits else "") from error

    def _own_values(self, piece: int, room: Float32Vector) -> Float32Vector:
        assert self._own is not None
        if self._own.codec.name == "fp32":
            return np.frombuffer(self._own.run(piece, piece + 1), dtype="<f4")
        self._own.decode_run(piece, piece + 1, room)
        return room
