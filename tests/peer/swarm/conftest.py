"""Forking processes that all tests of this folder share, started when the first test asks."""

from collections.abc import Iterator

import pytest

from tests.peer.swarm.forked_members import OLD_CPU, Forker, Forkers


@pytest.fixture(scope="session")
def forkers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forkers]:
    """For three members: the last one computes as on an old CPU."""
    logs = tmp_path_factory.mktemp("forkers")
    new, old = Forker({}, logs / "new_cpu.log"), Forker(OLD_CPU, logs / "old_cpu.log")
    yield new, new, old
    new.close()
    old.close()
