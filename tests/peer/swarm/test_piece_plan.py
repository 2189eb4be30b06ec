"""Who is asked for which pieces: timelines of slow, lying, dying and late donors, with time as an
argument.
"""

import heapq

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.swarm.piece_plan import MAX_OPEN_DONORS, MAX_RUN_PIECES, PieceLayout, PiecePlan
from protos.contract.digest import PIECE_VALUES


class Swarm:
    """Donors with a speed each, in virtual time; some die or lie when they have served so many
    pieces.
    """

    def __init__(
        self,
        seconds_per_piece: dict[str, float],
        *,
        num_pieces: int,
        dies_after: dict[str, int] | None = None,
        lies_after: dict[str, int] | None = None,
        held: tuple[int, ...] = (),
    ) -> None:
        self.speed = seconds_per_piece
        self.dies_after, self.lies_after = dies_after or {}, lies_after or {}
        self.plan = PiecePlan(num_pieces=num_pieces, donors=seconds_per_piece)
        self.plan.begin(held)
        self.now = 0.0
        self.num_served = dict.fromkeys(seconds_per_piece, 0)
        self.arrivals: list[tuple[float, str]] = []
        self.got: list[int] = []

    def run(self, *, max_seconds: float = 1e6) -> None:
        """Until complete, hopeless, or time is up."""
        plan = self.plan
        while not (plan.is_complete or plan.is_hopeless) and self.now < max_seconds:
            for peer_id in plan.donors_to_open(self.now):
                plan.opened(peer_id, self.now)
            for peer_id, donor in plan.donors.items():
                was_idle = not donor.owed
                while plan.next_order(peer_id, self.now) is not None:
                    pass
                if was_idle and donor.owed:
                    heapq.heappush(self.arrivals, (self.now + self.speed[peer_id], peer_id))
            if not self.arrivals:
                self.now += 0.1  # somebody waits for another try
                continue
            self.now, peer_id = heapq.heappop(self.arrivals)
            self._arrive(peer_id)

    def _arrive(self, peer_id: str) -> None:
        plan, donor = self.plan, self.plan.donors[peer_id]
        if not donor.owed:
            return
        self.num_served[peer_id] += 1
        if self.num_served[peer_id] > self.lies_after.get(peer_id, 10**9):
            plan.failed(peer_id, self.now, "lie", is_final=True)
        elif self.num_served[peer_id] > self.dies_after.get(peer_id, 10**9):
            plan.failed(peer_id, self.now, "connection lost")
        else:
            piece = donor.owed[0]
            if plan.received(peer_id, piece, self.now):
                self.got.append(piece)
            if donor.owed:
                heapq.heappush(self.arrivals, (self.now + self.speed[peer_id], peer_id))


def test_donors_share_the_pieces_by_their_speed() -> None:
    swarm = Swarm({"fast": 0.01, "middle": 0.02, "slow": 0.04}, num_pieces=700)
    swarm.run()
    assert swarm.plan.is_complete
    assert swarm.now == pytest.approx(700 / (100 + 50 + 25), rel=0.1)
    assert len(set(swarm.got)) == 700


def test_one_slow_donor_does_not_hold_up_the_end() -> None:
    swarm = Swarm({"fast": 0.01, "slow": 30.0}, num_pieces=200)
    swarm.run()
    assert swarm.plan.is_complete
    assert swarm.now < 200 * 0.01 * 2, "the fast one is asked for what the slow one owes"


def test_pieces_of_a_dead_donor_go_to_others_and_it_is_tried_again() -> None:
    swarm = Swarm({"a": 0.01, "b": 0.01}, num_pieces=300, dies_after={"a": 20})
    swarm.run()
    assert swarm.plan.is_complete
    assert swarm.plan.donors["a"].num_failures >= 1
    assert not swarm.plan.donors["a"].is_out or swarm.plan.donors["a"].num_failures == 5


def test_a_liar_is_never_asked_again() -> None:
    swarm = Swarm({"liar": 0.01, "honest": 0.05}, num_pieces=100, lies_after={"liar": 3})
    swarm.run()
    assert swarm.plan.is_complete
    assert swarm.num_served["liar"] == 4
    assert swarm.plan.donors["liar"].reason == "lie" and swarm.plan.donors["liar"].is_out


def test_without_an_honest_donor_the_download_is_hopeless_and_says_why() -> None:
    swarm = Swarm({"liar": 0.01, "dead": 0.01}, num_pieces=50, lies_after={"liar": 0})
    swarm.dies_after["dead"] = 0
    swarm.run()
    assert swarm.plan.is_hopeless and not swarm.plan.is_complete
    assert swarm.plan.donors["dead"].reason == "connection lost"
    assert swarm.plan.num_open == 0


def test_only_missing_pieces_are_asked_for_after_a_restart() -> None:
    held = tuple(range(0, 100, 3))
    swarm = Swarm({"a": 0.01, "b": 0.03}, num_pieces=100, held=held)
    swarm.run()
    assert swarm.plan.is_complete
    assert sorted(swarm.got) == [piece for piece in range(100) if piece not in held]


def test_nothing_is_ordered_before_the_list_is_proven() -> None:
    plan = PiecePlan(num_pieces=10, donors=["a"])
    assert plan.donors_to_open(0.0) == ["a"]
    plan.opened("a", 0.0)
    assert plan.next_order("a", 0.0) is None
    assert not plan.is_complete
    plan.begin(range(10))
    assert plan.is_complete


def test_few_donors_at_once_and_another_when_one_fails() -> None:
    plan = PiecePlan(num_pieces=10, donors=[f"p{i}" for i in range(MAX_OPEN_DONORS + 2)])
    first = plan.donors_to_open(0.0)
    assert first == [f"p{i}" for i in range(MAX_OPEN_DONORS)]
    assert plan.donors_to_open(0.0) == []
    plan.failed("p0", 0.0, "no state 1/5 is held", is_final=True)
    assert plan.donors_to_open(0.0) == [f"p{MAX_OPEN_DONORS}"]


def test_retries_are_spaced_out_and_end() -> None:
    plan = PiecePlan(num_pieces=10, donors=["a"])
    now, waits = 0.0, []
    while not plan.is_hopeless:
        while not plan.donors_to_open(now):
            now += 0.125
        plan.failed("a", now, "unreachable")
        waits.append(plan.donors["a"].retry_seconds - now)
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0]


def test_patience_follows_the_measured_speed() -> None:
    plan = PiecePlan(num_pieces=10, donors=["a"])
    plan.begin([])
    plan.donors_to_open(0.0)
    plan.opened("a", 0.0)
    before = plan.patience_seconds("a")
    order = plan.next_order("a", 0.0)
    assert order is not None and (order.begin_piece, order.end_piece) == (0, 4)
    plan.received("a", 0, 4.0)
    assert plan.patience_seconds("a") == 32.0 > before


@given(
    speeds=st.lists(st.floats(0.001, 5.0), min_size=1, max_size=5),
    num_pieces=st.integers(1, 300),
    deaths=st.lists(st.integers(0, 50), max_size=4),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_every_piece_comes_once_whatever_happens_while_one_donor_is_honest(
    speeds: list[float], num_pieces: int, deaths: list[int], data: st.DataObject
) -> None:
    names = [f"p{index}" for index in range(len(speeds))]
    troubles = dict(zip(names[1:], deaths, strict=False))
    liars = data.draw(st.sets(st.sampled_from(names[1:])) if names[1:] else st.just(set()))
    swarm = Swarm(
        dict(zip(names, speeds, strict=True)),
        num_pieces=num_pieces,
        dies_after={name: after for name, after in troubles.items() if name not in liars},
        lies_after={name: after for name, after in troubles.items() if name in liars},
    )
    swarm.run()
    assert swarm.plan.is_complete
    assert sorted(swarm.got) == list(range(num_pieces)), "each piece counted once"
    for donor in swarm.plan.donors.values():
        assert len(donor.owed) <= 2 * MAX_RUN_PIECES


def test_layout_numbers_the_pieces_of_all_vectors_through() -> None:
    layout = PieceLayout((PIECE_VALUES + 10, 7))
    assert (layout.num_pieces, layout.total_bytes) == (3, 4 * (PIECE_VALUES + 17))
    assert layout.bytes_of(1) == (4 * PIECE_VALUES, 40)
    assert layout.bytes_of(2) == (4 * (PIECE_VALUES + 10), 28)
    assert layout.by_vector([b"a", b"b", b"c"]) == [[b"a", b"b"], [b"c"]]
    with pytest.raises(IndexError):
        layout.bytes_of(3)
