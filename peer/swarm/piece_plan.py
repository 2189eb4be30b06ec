"""Which donor is asked for which pieces of a state: pure, so that slow, lying and dying donors are
hand-made timelines.

Every piece goes to one donor, in runs that take about half a second at the speed measured for that
donor, one run ahead of what arrives, so the pipe never runs dry. When nothing is left to hand out,
a faster donor is asked as well for the end of what the slowest one still owes; whichever arrives
first counts. A donor that fails gives its pieces back and is tried again later, with patience that
doubles; one whose bytes do not match the proven digests is never asked again.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from protos.contract.digest import PIECE_VALUES, num_pieces

MAX_OPEN_DONORS = 6
RUN_SECONDS = 0.5
MAX_RUN_PIECES = 64
_FIRST_RUN_PIECES = 4
_FIRST_PATIENCE_SECONDS = 20.0
"""For the first piece: a donor may have to write a large state to its disk before it can answer."""
_MIN_PATIENCE_SECONDS = 5.0
_PATIENCE_PIECES = 8
"""Pieces' worth of silence after which a donor counts as gone."""
_MAX_FAILURES = 5
"""In a row, without a piece between them."""
_RETRY_SECONDS = 0.5
_STEAL_RATIO = 2.0
"""How much earlier a second donor must be expected to bring a piece than the first."""


@dataclass(frozen=True, slots=True)
class PieceLayout:
    """Pieces of all vectors of a state, numbered through; in a file, one behind the other."""

    sizes: tuple[int, ...]
    """Values of each vector."""

    @property
    def num_pieces(self) -> int:
        """Pieces of all vectors."""
        return sum(num_pieces(size) for size in self.sizes)

    @property
    def total_bytes(self) -> int:
        """Bytes of all vectors, fp32."""
        return 4 * sum(self.sizes)

    def bytes_of(self, piece: int) -> tuple[int, int]:
        """(offset, length) in bytes of a piece."""
        first_value = 0
        for size in self.sizes:
            here = num_pieces(size)
            if piece < here:
                low = piece * PIECE_VALUES
                return 4 * (first_value + low), 4 * min(PIECE_VALUES, size - low)
            piece, first_value = piece - here, first_value + size
        raise IndexError("there is no such piece")

    def by_vector(self, digests: Sequence[bytes]) -> list[list[bytes]]:
        """Digests of all pieces, one list per vector."""
        rest, lists = list(digests), []
        for size in self.sizes:
            lists.append(rest[: num_pieces(size)])
            rest = rest[num_pieces(size) :]
        return lists


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Consecutive pieces to ask a donor for."""

    begin_piece: int
    end_piece: int
    reason: str


@dataclass(slots=True, kw_only=True)
class Donor:
    """What is known of one donor."""

    peer_id: str
    is_open: bool = False
    """Connected, and its list of pieces is that of the proven state."""
    is_opening: bool = False
    is_out: bool = False
    """Never asked again for this state."""
    owed: deque[int] = field(default_factory=deque)
    """Pieces asked for and not arrived, in the order in which they will arrive."""
    num_received: int = 0
    num_failures: int = 0
    retry_seconds: float = 0.0
    last_event_seconds: float = 0.0
    """When it last brought a piece, or was asked while it owed nothing."""
    seconds_per_piece: float | None = None
    reason: str = "not asked yet"


class PiecePlan:
    """State of one download; every method takes the monotonic time where it matters."""

    def __init__(self, *, num_pieces: int, donors: Iterable[str]) -> None:
        """Nothing is handed out before `begin`. Donors are tried in the given order."""
        self.num_pieces = num_pieces
        self.donors = {peer_id: Donor(peer_id=peer_id) for peer_id in donors}
        self.num_held = 0
        self._is_held = bytearray(num_pieces)
        self._num_askers = bytearray(num_pieces)
        self._lowest_free = 0
        self._has_begun = False

    @property
    def is_complete(self) -> bool:
        """True when every piece is held."""
        return self._has_begun and self.num_held == self.num_pieces

    @property
    def is_hopeless(self) -> bool:
        """True when no donor is left that could bring the rest."""
        return not self.is_complete and all(donor.is_out for donor in self.donors.values())

    @property
    def num_open(self) -> int:
        """Donors that are at work."""
        return sum(donor.is_open for donor in self.donors.values())

    def begin(self, held: Iterable[int]) -> None:
        """The list of pieces is proven; `held` are there already, from an earlier try."""
        self._has_begun = True
        for piece in held:
            self._hold(piece)

    # Donors -----------------------------------------------------------------------------------

    def donors_to_open(self, now_seconds: float) -> list[str]:
        """Whom to connect to now."""
        busy = sum(donor.is_open or donor.is_opening for donor in self.donors.values())
        waiting = (
            donor
            for donor in self.donors.values()
            if not (donor.is_out or donor.is_open or donor.is_opening)
            and donor.retry_seconds <= now_seconds
        )
        chosen = [donor for _, donor in zip(range(MAX_OPEN_DONORS - busy), waiting, strict=False)]
        for donor in chosen:
            donor.is_opening = True
        return [donor.peer_id for donor in chosen]

    def opened(self, peer_id: str, now_seconds: float) -> None:
        """Its list of pieces is that of the proven state."""
        donor = self.donors[peer_id]
        donor.is_opening, donor.is_open = False, True
        donor.last_event_seconds, donor.reason = now_seconds, "at work"

    def failed(
        self, peer_id: str, now_seconds: float, reason: str, *, is_final: bool = False
    ) -> None:
        """A donor broke, was silent, refused or lied (the last two are final); its pieces are free
        again.
        """
        donor = self.donors[peer_id]
        donor.is_open = donor.is_opening = False
        donor.reason = reason
        donor.num_failures += 1
        donor.retry_seconds = now_seconds + _RETRY_SECONDS * 2 ** (donor.num_failures - 1)
        donor.is_out = is_final or donor.num_failures >= _MAX_FAILURES
        for piece in donor.owed:
            self._num_askers[piece] -= 1
            if not self._num_askers[piece]:
                self._lowest_free = min(self._lowest_free, piece)
        donor.owed.clear()

    def patience_seconds(self, peer_id: str) -> float:
        """How long to wait for the next piece of a donor."""
        pace = self.donors[peer_id].seconds_per_piece
        if pace is None:
            return _FIRST_PATIENCE_SECONDS
        return max(_MIN_PATIENCE_SECONDS, _PATIENCE_PIECES * pace)

    # Pieces -----------------------------------------------------------------------------------

    def next_order(self, peer_id: str, now_seconds: float) -> Order | None:
        """What to ask a donor for now; None if it owes enough or nothing is left for it."""
        donor = self.donors[peer_id]
        run = self._run_pieces(donor)
        if not self._has_begun or not donor.is_open or len(donor.owed) >= run:
            return None
        pieces, reason = self._free_run(run), "free"
        if not pieces:
            pieces, reason = self._late_run(donor, run, now_seconds)
        if not pieces:
            return None
        if not donor.owed:
            donor.last_event_seconds = now_seconds
        donor.owed.extend(pieces)
        for piece in pieces:
            self._num_askers[piece] += 1
        return Order(begin_piece=pieces[0], end_piece=pieces[-1] + 1, reason=reason)

    def received(self, peer_id: str, piece: int, now_seconds: float) -> bool:
        """The next piece that a donor owed is here and right; True if it was still missing."""
        donor = self.donors[peer_id]
        assert donor.owed and donor.owed[0] == piece, "pieces arrive as they were asked for"
        donor.owed.popleft()
        self._num_askers[piece] -= 1
        passed_seconds = max(now_seconds - donor.last_event_seconds, 1e-6)
        before = donor.seconds_per_piece
        donor.seconds_per_piece = (
            passed_seconds if before is None else 0.8 * before + 0.2 * passed_seconds
        )
        donor.last_event_seconds = now_seconds
        donor.num_received, donor.num_failures = donor.num_received + 1, 0
        return self._hold(piece)

    def _hold(self, piece: int) -> bool:
        if self._is_held[piece]:
            return False
        self._is_held[piece] = 1
        self.num_held += 1
        return True

    def _run_pieces(self, donor: Donor) -> int:
        if donor.seconds_per_piece is None:
            return _FIRST_RUN_PIECES
        return min(MAX_RUN_PIECES, max(1, round(RUN_SECONDS / donor.seconds_per_piece)))

    def _is_free(self, piece: int) -> bool:
        return not self._is_held[piece] and not self._num_askers[piece]

    def _free_run(self, num_wanted: int) -> list[int]:
        while self._lowest_free < self.num_pieces and not self._is_free(self._lowest_free):
            self._lowest_free += 1
        begin = self._lowest_free
        ahead = range(begin, min(begin + num_wanted, self.num_pieces))
        return list(takewhile(self._is_free, ahead))

    def _late_run(self, donor: Donor, num_wanted: int, now_seconds: float) -> tuple[list[int], str]:
        """End of what the slowest other donor owes, where this one is expected well before it."""
        pace = donor.seconds_per_piece
        if pace is None:
            return [], ""
        own_seconds = _STEAL_RATIO * pace * (len(donor.owed) + 1)
        slowest, longest_seconds = None, own_seconds
        for other in self.donors.values():
            if other is not donor and other.owed:
                seconds = self._pace_now(other, now_seconds) * len(other.owed)
                if seconds > longest_seconds:
                    slowest, longest_seconds = other, seconds
        if slowest is None:
            return [], ""
        run: list[int] = []
        for piece in reversed(slowest.owed):
            is_wanted = not self._is_held[piece] and self._num_askers[piece] == 1
            if not is_wanted or (run and piece != run[0] - 1) or len(run) >= num_wanted:
                break
            if self._pace_now(slowest, now_seconds) * (len(slowest.owed) - len(run)) < own_seconds:
                break
            run.insert(0, piece)
        return run, f"late from {slowest.peer_id}: {longest_seconds:.1f} s expected"

    def _pace_now(self, donor: Donor, now_seconds: float) -> float:
        """Seconds per piece; a silent donor grows slower with every second."""
        return max(donor.seconds_per_piece or 0.0, now_seconds - donor.last_event_seconds)
