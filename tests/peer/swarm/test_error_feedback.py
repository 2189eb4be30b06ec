"""Error feedback: nothing is lost for good, and the residual follows the outcome of the round."""

from pathlib import Path

import numpy as np
import pytest

from peer.swarm.codecs import EncodedVector
from peer.swarm.error_feedback import ErrorFeedback
from peer.swarm.fragments import Fragment
from protos.contract.codecs_wire import codec_named

NUM_VALUES = 9_000
WHOLE = Fragment(((0, NUM_VALUES),))
EVEN, ODD = Fragment(((0, 4_000), (8_000, 9_000))), Fragment(((4_000, 8_000),))


class Member:
    """A member whose rounds are all its own."""

    def __init__(self, codec: str) -> None:
        self.feedback = ErrorFeedback(codec_named(codec), np.zeros(NUM_VALUES, dtype=np.float32))
        self.step = 0

    def encode(self, fragment: Fragment, values: np.ndarray) -> EncodedVector:
        return self.feedback.encode(fragment, values, place=(1, self.step))

    def end_round(self, *, is_committed: bool = True) -> None:
        self.step += 1
        self.feedback.end_round(is_committed=is_committed, place=(1, self.step))

    @property
    def norm(self) -> float:
        return self.feedback.norm


def contribution(seed: int, size: int = NUM_VALUES) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


@pytest.mark.parametrize("codec", ["int8", "int4", "sparse"])
def test_what_is_left_out_comes_later(codec: str) -> None:
    member = Member(codec)
    arrived = np.zeros(NUM_VALUES)
    wanted = np.zeros(NUM_VALUES)
    for seed in range(40):
        values = contribution(seed)
        wanted += values
        arrived += member.encode(WHOLE, values).decoded()
        member.end_round()
    owed = float(np.linalg.norm(wanted - arrived))
    assert owed == pytest.approx(member.norm, rel=1e-3)
    once = Member(codec)
    once.encode(WHOLE, contribution(0))
    once.end_round()
    assert owed < 40 * once.norm / 3


def test_fp32_owes_nothing() -> None:
    member = Member("fp32")
    values = contribution(1)
    assert np.array_equal(member.encode(WHOLE, values).decoded(), values)
    member.end_round()
    assert member.norm == 0.0


def test_only_a_commit_changes_the_residual_and_a_resync_clears_it() -> None:
    member = Member("int4")
    first = bytes(member.encode(WHOLE, contribution(1)).data)
    assert bytes(member.encode(WHOLE, contribution(1)).data) == first  # another attempt: the same
    assert member.norm == 0.0
    member.end_round()
    owed = member.norm
    assert owed > 0
    assert bytes(member.encode(WHOLE, contribution(1)).data) != first
    assert member.norm == owed
    member.end_round(is_committed=False)
    assert member.norm == 0.0
    assert bytes(member.encode(WHOLE, contribution(1)).data) == first


def test_a_residual_of_another_state_is_not_used() -> None:
    member = Member("int4")
    first = bytes(member.encode(WHOLE, contribution(1)).data)
    member.end_round()
    member.step += 1  # brought forward without having been in the round
    assert bytes(member.encode(WHOLE, contribution(1)).data) == first


def test_each_fragment_has_its_own_residual() -> None:
    member = Member("sparse")
    member.encode(EVEN, contribution(1, EVEN.num_values))
    member.end_round()
    owed = member.norm
    encoded = member.encode(ODD, np.zeros(ODD.num_values, dtype=np.float32))
    assert not encoded.decoded().any()
    member.end_round()
    assert member.norm == owed
    again = member.encode(EVEN, np.zeros(EVEN.num_values, dtype=np.float32))
    assert again.decoded().any()


def test_a_residual_is_kept_for_the_very_state_it_was_saved_for(tmp_path: Path) -> None:
    member = Member("int8")
    for _ in range(2):
        member.encode(WHOLE, contribution(1))
        member.end_round()
        member.feedback.save(tmp_path, (1, member.step))
    member.feedback.save(tmp_path, (1, 7))  # not the state that the residual belongs to
    assert [path.name for path in tmp_path.iterdir()] == ["1-2.residual"]
    restarted = Member("int8")
    assert not restarted.feedback.load(tmp_path, (1, 1)) and restarted.norm == 0.0
    assert restarted.feedback.load(tmp_path, (1, 2)) and restarted.norm == member.norm
    (tmp_path / "1-2.residual").write_bytes(b"\xff" * (4 * NUM_VALUES))
    assert not restarted.feedback.load(tmp_path, (1, 2)) and restarted.norm == 0.0
