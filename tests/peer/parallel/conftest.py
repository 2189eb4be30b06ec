"""One set of real local ranks for all tests of layouts; each test configures them anew."""

import os
from collections.abc import Iterator

import pytest

from peer.parallel.ranks import LocalRanks

MAX_VALUES = 2**20
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # as the daemon sets it for its children


class Keeper:
    """Starts the ranks at first use, and again after a test that has lost one."""

    def __init__(self) -> None:
        self._ranks: LocalRanks | None = None

    def ranks(self) -> LocalRanks:
        if self._ranks is not None and self._ranks.is_broken:
            self.close()
        if self._ranks is None:
            self._ranks = LocalRanks(4, num_values=MAX_VALUES)
        return self._ranks

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.close()
        self._ranks = None


@pytest.fixture(scope="session")
def keeper() -> Iterator[Keeper]:
    keeper = Keeper()
    yield keeper
    keeper.close()


@pytest.fixture
def node(keeper: Keeper) -> LocalRanks:
    return keeper.ranks()
