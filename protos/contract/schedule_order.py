"""In which order a run trains its data: a pure function of (seed, manifest, seq_len), the same for
any number of peers.

Three levels, all computed with integers and raw Philox words (numpy promises the stream of a bit
generator for ever, not that of its `permutation`):

1. Sources are interleaved by weight so that after every n chunks each source has had its share of n
   to within less than one chunk: among sources that are not ahead of their share, the one whose
   next chunk is due first (single-machine Pfair scheduling; earliest deadline is optimal there.
   Plain largest-deficit can fall more than one chunk behind).
2. Inside a source, pass p visits its chunks in a permutation keyed by (seed, source, p); passes
   follow one another for ever.
3. Inside a chunk, pass p visits the windows in a permutation keyed by (seed, chunk, p). WindowRange
   indices are positions in that order.

Chunks too small for one window are left out.
"""

import hashlib

import numpy as np

from protos.contract.chunk_format import Int64Array, Manifest, num_windows
from protos.contract.errors import UsageError

_WEIGHT_UNITS = 2**32


def philox_permutation(key_text: str, num_items: int) -> Int64Array:
    """Permutation of range(num_items) that depends on the text only, on every machine and numpy
    version.
    """
    key = int.from_bytes(hashlib.sha256(key_text.encode()).digest()[:16], "big")
    words = np.random.Philox(key=key).random_raw(num_items)
    return np.argsort(words, kind="stable").astype(np.int64)


def window_order(seed: int, *, data_pass: int, chunk_index: int, chunk_windows: int) -> Int64Array:
    """Index in the file of each window of a chunk, in the order of this pass; needs no manifest."""
    key_text = f"muster windows 1\n{seed}\n{chunk_index}\n{data_pass}"
    return philox_permutation(key_text, chunk_windows)


class ScheduleOrder:
    """The infinite sequence of chunks of a run, and the order of windows inside each."""

    def __init__(self, seed: int, manifest: Manifest, seq_len: int) -> None:
        """Raises UsageError if no chunk holds a whole window."""
        self._seed = seed
        self._seq_len = seq_len
        self._num_windows = [
            num_windows(chunk.num_tokens, seq_len) for chunk in manifest.training_chunks
        ]
        chunks_by_source: dict[int, list[int]] = {}
        for chunk_index, chunk in enumerate(manifest.training_chunks):
            if self._num_windows[chunk_index]:
                chunks_by_source.setdefault(chunk.source_index, []).append(chunk_index)
        if not chunks_by_source:
            raise UsageError(
                f"corpus without a single window of {seq_len} tokens",
                allowed="a corpus larger than seq_len",
                remedy="add text or lower model.seq_len",
            )
        self._sources = sorted(chunks_by_source)
        self._chunks = [chunks_by_source[source] for source in self._sources]
        weights = [manifest.sources[source].weight for source in self._sources]
        self._shares = [max(1, round(weight / sum(weights) * _WEIGHT_UNITS)) for weight in weights]
        self._counts = [0] * len(self._sources)
        self._permutations: list[Int64Array] = [np.empty(0, np.int64)] * len(self._sources)
        self._sequence: list[tuple[int, int]] = []

    def chunk_at(self, position: int) -> tuple[int, int]:
        """(data_pass, chunk_index) of a position, from 0. The first call costs a step for each
        earlier position.
        """
        while len(self._sequence) <= position:
            self._extend()
        return self._sequence[position]

    def num_windows(self, chunk_index: int) -> int:
        """Windows of a chunk; 0 for chunks that are left out."""
        return self._num_windows[chunk_index]

    def window_order(self, data_pass: int, chunk_index: int) -> Int64Array:
        """Index in the file of each window of the chunk, in the order of this pass."""
        return window_order(
            self._seed,
            data_pass=data_pass,
            chunk_index=chunk_index,
            chunk_windows=self._num_windows[chunk_index],
        )

    def tokens_within_passes(self, max_data_passes: int) -> int:
        """Tokens of the sequence before the first chunk that would be a pass too many: the largest
        allowed budget.
        """
        total_windows, position = 0, 0
        while True:
            data_pass, chunk_index = self.chunk_at(position)
            if data_pass >= max_data_passes:
                return total_windows * self._seq_len
            total_windows += self._num_windows[chunk_index]
            position += 1

    def _extend(self) -> None:
        slot = self._next_source()
        data_pass, offset = divmod(self._counts[slot], len(self._chunks[slot]))
        if offset == 0:
            key_text = f"muster chunks 1\n{self._seed}\n{self._sources[slot]}\n{data_pass}"
            self._permutations[slot] = philox_permutation(key_text, len(self._chunks[slot]))
        self._counts[slot] += 1
        self._sequence.append(
            (data_pass, self._chunks[slot][int(self._permutations[slot][offset])])
        )

    def _next_source(self) -> int:
        """Slot of the eligible source whose next chunk has the earliest deadline; the first among
        equals.
        """
        end, total = len(self._sequence) + 1, sum(self._shares)
        best_slot, best_deadline = -1, 0
        for slot, (count, share) in enumerate(zip(self._counts, self._shares, strict=True)):
            if count * total >= share * end:
                continue
            deadline = -(-(count + 1) * total // share)
            if best_slot < 0 or deadline < best_deadline:
                best_slot, best_deadline = slot, deadline
        return best_slot
