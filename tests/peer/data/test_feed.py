"""Feed: every leased window once and in order, contributions that add up, positions that resume."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from peer.data.feed import START, Feed, LeaseUnreadableError, MicroBatch, TrainedRange
from peer.data.reader import ChunkReader, LeasedRange, leased_range_from_signed
from peer.model.objectives import Examples
from protos.contract.errors import CorruptDataError
from tests.peer.data.chunks import (
    SEQ_LEN,
    VOCAB_SIZE,
    causal_builder,
    made_up_lease,
    numbered_windows,
    signed_lease,
    write_chunk,
)

Window = tuple[int, int]
"""(lease number, window)."""


def new_feed(*leases: LeasedRange, position: tuple[int, int] = START) -> Feed:
    """A feed of numbered windows."""
    feed = Feed(seq_len=SEQ_LEN, read_windows=numbered_windows, position=position)
    feed.add(leases)
    return feed


def windows_of(batch: MicroBatch) -> list[Window]:
    """Which windows a batch of numbered windows holds."""
    examples = batch.examples
    assert examples.inputs_BT.shape == examples.labels_BT.shape
    pairs = zip(examples.inputs_BT[:, 0], examples.labels_BT[:, 0], strict=True)
    return [(int(lease_number), int(window)) for lease_number, window in pairs]


def windows_in(ranges: tuple[TrainedRange, ...]) -> list[Window]:
    """Windows of a contribution."""
    return [(r.lease_number, w) for r in ranges for w in range(r.begin_window, r.end_window)]


def drain(feed: Feed, *, max_windows: int = 3) -> list[Window]:
    """Everything that the feed still yields."""
    seen: list[Window] = []
    while (batch := feed.next_micro_batch(max_windows=max_windows)) is not None:
        seen += windows_of(batch)
    return seen


lease_lists = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), min_size=0, max_size=6).map(
    lambda parts: [
        made_up_lease(number, begin, begin + size)
        for number, (begin, size) in enumerate(parts, start=1)
    ]
)


def windows_leased(leases: list[LeasedRange]) -> list[Window]:
    """All windows of leases, in order."""
    return [(x.lease_number, w) for x in leases for w in range(x.begin_window, x.end_window)]


@given(
    leases=lease_lists,
    sizes=st.lists(st.integers(1, 7), min_size=1),
    cuts=st.sets(st.integers(0, 9)),
)
def test_windows_are_yielded_once_in_order(
    leases: list[LeasedRange], sizes: list[int], cuts: set[int]
) -> None:
    feed = new_feed(*leases)
    expected = windows_leased(leases)
    assert feed.held_tokens == len(expected) * SEQ_LEN
    yielded: list[Window] = []
    contributed: list[Window] = []
    step = 0
    while (batch := feed.next_micro_batch(max_windows=sizes[step % len(sizes)])) is not None:
        windows = windows_of(batch)
        assert 1 <= len(windows) <= sizes[step % len(sizes)]
        assert batch.examples.num_tokens == len(windows) * SEQ_LEN
        yielded += windows
        assert feed.trained_tokens == (len(yielded) - len(contributed)) * SEQ_LEN
        if step in cuts:
            contributed += windows_in(feed.cut())
        step += 1
    contributed += windows_in(feed.cut())
    assert yielded == contributed == expected
    assert feed.held_tokens == feed.trained_tokens == 0


@given(leases=lease_lists, num_batches=st.integers(0, 10), max_windows=st.integers(1, 5))
def test_a_position_resumes(leases: list[LeasedRange], num_batches: int, max_windows: int) -> None:
    feed = new_feed(*leases)
    seen: list[Window] = []
    for _ in range(num_batches):
        batch = feed.next_micro_batch(max_windows=max_windows)
        seen += windows_of(batch) if batch else []
        assert batch is None or batch.position == feed.position
    plain = json.loads(json.dumps(feed.position))
    resumed = new_feed(*leases, position=(plain[0], plain[1]))
    assert seen + drain(resumed) == windows_leased(leases)


class FeedMachine(RuleBasedStateMachine):
    """Any order of calls: no window is trained twice, and no contribution names one that was not
    trained.
    """

    def __init__(self) -> None:
        super().__init__()
        self.feed = new_feed()
        self.next_number = 1
        self.owed: set[Window] = set()
        self.yielded: list[Window] = []
        self.since_cut: list[Window] = []
        self.in_contribution: list[Window] = []

    @rule(begin=st.integers(0, 3), size=st.integers(1, 5))
    def add(self, begin: int, size: int) -> None:
        """A new lease arrives, twice."""
        lease = made_up_lease(self.next_number, begin, begin + size)
        self.next_number += 1
        assert self.feed.add([lease, lease]) == ()
        self.owed |= set(windows_leased([lease]))

    @rule(max_windows=st.integers(1, 6))
    def train(self, max_windows: int) -> None:
        """A micro-batch."""
        batch = self.feed.next_micro_batch(max_windows=max_windows)
        assert (batch is None) == (not self.owed)
        windows = windows_of(batch) if batch else []
        assert len(windows) == min(max_windows, len(self.owed))
        assert windows == sorted(self.owed)[: len(windows)]
        self.owed -= set(windows)
        self.yielded += windows
        self.since_cut += windows

    @rule()
    def cut(self) -> None:
        """The contribution is closed."""
        assert windows_in(self.feed.cut()) == self.since_cut
        self.in_contribution += self.since_cut
        self.since_cut = []

    @rule()
    def settle(self) -> None:
        """The round was committed."""
        self.feed.settle()
        self.in_contribution = []

    @rule()
    def abandon(self) -> None:
        """The round was lost."""
        begun = {number for number, _ in self.in_contribution + self.since_cut}
        assert self.feed.abandon() == tuple(sorted(begun))
        self.owed = {window for window in self.owed if window[0] not in begun}
        self.since_cut, self.in_contribution = [], []

    @precondition(lambda self: self.next_number > 1)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """The coordinator says that a lease is lost."""
        number = data.draw(st.integers(1, self.next_number - 1))
        begun = {n for n, _ in self.in_contribution + self.since_cut}
        held = {n for n, _ in self.owed}
        dropped = self.feed.drop([number])
        assert dropped.lease_numbers == tuple({number} & (begun | held))
        assert dropped.begun_lease_numbers == tuple({number} & begun)
        self.owed = {window for window in self.owed if window[0] != number}

    @invariant()
    def nothing_is_yielded_twice(self) -> None:
        """And what is held is what is owed."""
        assert len(set(self.yielded)) == len(self.yielded)
        assert self.feed.held_tokens == len(self.owed) * SEQ_LEN
        begun = {number for number, _ in self.in_contribution + self.since_cut}
        assert self.feed.begun_lease_numbers == tuple(sorted(begun))


FeedMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestFeedMachine = FeedMachine.TestCase


def test_leases_may_come_out_of_order_until_they_are_passed() -> None:
    feed = new_feed(made_up_lease(5, 0, 2))
    assert feed.add([made_up_lease(4, 0, 1)]) == ()
    batch = feed.next_micro_batch(max_windows=2)
    assert batch is not None and windows_of(batch) == [(4, 0), (5, 0)]
    assert feed.add([made_up_lease(3, 0, 9), made_up_lease(4, 0, 1)]) == (3, 4)
    assert drain(feed) == [(5, 1)]


def test_reset_begins_a_new_incarnation() -> None:
    feed = new_feed(made_up_lease(1, 0, 2), made_up_lease(2, 0, 2), made_up_lease(3, 0, 2))
    feed.next_micro_batch(max_windows=3)
    assert feed.reset() == (1, 2, 3)
    assert feed.position == START
    assert feed.cut() == ()
    feed.add([made_up_lease(1, 0, 1)])
    assert drain(feed) == [(1, 0)]


def test_an_unreadable_lease_is_named_and_nothing_moves() -> None:
    def read(leased: LeasedRange, begin: int, end: int) -> Examples:
        if leased.lease_number == 2:
            raise CorruptDataError("chunk is damaged", allowed="a whole one", remedy="fetch it")
        return numbered_windows(leased, begin, end)

    feed = Feed(seq_len=SEQ_LEN, read_windows=read)
    feed.add([made_up_lease(1, 0, 2), made_up_lease(2, 0, 2), made_up_lease(3, 0, 1)])
    with pytest.raises(LeaseUnreadableError, match="lease 2: chunk is damaged") as caught:
        feed.next_micro_batch(max_windows=4)
    assert caught.value.lease_number == 2
    assert feed.position == START and feed.trained_tokens == 0
    assert feed.drop([2]).lease_numbers == (2,)
    assert drain(feed) == [(1, 0), (1, 1), (3, 0)]


def test_a_batch_has_windows() -> None:
    with pytest.raises(ValueError, match="at least one window"):
        new_feed().next_micro_batch(max_windows=0)


def test_real_chunks_through_a_feed(tmp_path: Path) -> None:
    chunk_reader = ChunkReader(causal_builder(), seed=1, seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE)
    feed = Feed(seq_len=SEQ_LEN, read_windows=chunk_reader.read_windows)
    path = write_chunk(tmp_path)
    for number, (begin, end) in enumerate(((0, 4), (4, 10)), start=1):
        signed = signed_lease(path, lease_number=number, begin=begin, end=end)
        feed.add([leased_range_from_signed(signed, path=path)])
    batches = []
    while (batch := feed.next_micro_batch(max_windows=3)) is not None:
        batches.append(batch)
    tokens = np.concatenate([batch.examples.inputs_BT for batch in batches]).ravel()
    assert sorted(tokens) == list(range(40))
    assert [batch.examples.inputs_BT.shape[0] for batch in batches] == [3, 3, 3, 1]
    parts = [(part.lease_number, part.begin_window, part.end_window) for part in feed.cut()]
    assert parts == [(1, 0, 4), (2, 4, 10)]


def test_work_after_the_cut_can_be_abandoned_alone() -> None:
    feed = new_feed(made_up_lease(1, 0, 4), made_up_lease(2, 4, 8), made_up_lease(3, 8, 10))
    feed.next_micro_batch(max_windows=3)
    feed.cut()
    feed.next_micro_batch(max_windows=3)  # the end of lease 1, the beginning of lease 2
    assert feed.abandon(is_contribution_kept=True) == (1, 2)
    assert feed.trained_tokens == 0 and feed.begun_lease_numbers == (1,)
    assert drain(feed) == [(3, 8), (3, 9)]
    assert feed.abandon() == (1, 3)
