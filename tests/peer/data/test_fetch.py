"""Cache: only verified files, within the limit, never without what is leased."""

import asyncio
import hashlib
import os
import resource
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from peer.data.fetch import MAX_ATTEMPTS, ChunkCache, WantedFile
from protos.contract.errors import CorruptDataError, ErrorCode, MachineError, UnavailableError

SIZE_BYTES = 100


def contents(index: int) -> bytes:
    """Bytes of file number `index`."""
    return bytes([index]) * SIZE_BYTES


def wanted(index: int) -> WantedFile:
    """File number `index`."""
    return WantedFile(
        name=f"training chunk {index}",
        digest=hashlib.sha256(contents(index)).digest(),
        max_bytes=SIZE_BYTES,
        num_bytes=SIZE_BYTES,
    )


class Server:
    """A source that can be told to misbehave; streams in pieces of 30 bytes."""

    def __init__(self) -> None:
        self.num_streams = 0
        self.answers: list[bytes | Exception] = []
        """What the next streams send instead of the truth."""
        self.may_go_on: Callable[[], Awaitable[object]] | None = None

    async def __call__(self, file: WantedFile) -> AsyncIterator[bytes]:
        """Stream a file."""
        self.num_streams += 1
        data: bytes | Exception = contents(int(file.name.split()[-1]))
        if self.answers:
            data = self.answers.pop(0)
        if self.may_go_on is not None:
            await self.may_go_on()
        if isinstance(data, Exception):
            raise data
        for begin in range(0, len(data), 30):
            yield data[begin : begin + 30]


def new_cache(folder: Path, *, num_files: int = 100) -> ChunkCache:
    """A cache with room for so many files."""
    return ChunkCache(folder / "cache", limit_bytes=num_files * SIZE_BYTES)


def stored(cache: ChunkCache) -> list[int]:
    """Which of the first ten files lie on the disk."""
    return [index for index in range(10) if cache.path_of(wanted(index).digest).exists()]


def test_a_file_is_fetched_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        cache, server = new_cache(tmp_path), Server()
        path = await cache.fetch(wanted(1), server)
        assert path.read_bytes() == contents(1)
        assert path.name == wanted(1).digest.hex()
        assert await cache.fetch(wanted(1), server) == path
        assert server.num_streams == 1
        assert (cache.stats.num_hits, cache.stats.num_fetches) == (1, 1)
        assert cache.stats.fetched_bytes == cache.stats.stored_bytes == SIZE_BYTES

    asyncio.run(scenario())


def test_waiters_share_a_download_and_one_may_leave(tmp_path: Path) -> None:
    async def scenario() -> None:
        cache, server, gate = new_cache(tmp_path), Server(), asyncio.Event()
        server.may_go_on = gate.wait
        waiters = [asyncio.create_task(cache.fetch(wanted(1), server)) for _ in range(3)]
        await asyncio.wait(waiters, timeout=0.01)
        waiters[0].cancel()
        gate.set()
        first, *others = await asyncio.gather(*waiters, return_exceptions=True)
        assert isinstance(first, asyncio.CancelledError)
        assert others == [cache.path_of(wanted(1).digest)] * 2
        assert server.num_streams == 1

    asyncio.run(scenario())


def test_close_stops_downloads(tmp_path: Path) -> None:
    async def scenario() -> None:
        cache, server, gate = new_cache(tmp_path), Server(), asyncio.Event()
        server.may_go_on = gate.wait
        waiter = asyncio.create_task(cache.fetch(wanted(1), server))
        await asyncio.wait([waiter], timeout=0.01)
        await cache.close()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert stored(cache) == []

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "bad", [contents(1)[:-1], contents(2), b"", contents(1) + b"x", contents(1)[:-1] + b"\0"]
)
def test_damaged_streams_are_asked_for_again(tmp_path: Path, bad: bytes) -> None:
    async def scenario() -> None:
        cache, server = new_cache(tmp_path), Server()
        server.answers = [bad] * (MAX_ATTEMPTS - 1)
        path = await cache.fetch(wanted(1), server)
        assert path.read_bytes() == contents(1)
        assert cache.stats.num_corrupt == MAX_ATTEMPTS - 1
        server.answers = [bad] * MAX_ATTEMPTS
        cache.discard(wanted(1).digest)
        with pytest.raises(CorruptDataError, match="training chunk 1"):
            await cache.fetch(wanted(1), server)
        assert os.listdir(tmp_path / "cache") == []

    asyncio.run(scenario())


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_file_damaged_on_disk_is_fetched_again(tmp_path: Path, damage: str) -> None:
    async def scenario() -> None:
        cache, server = new_cache(tmp_path), Server()
        path = await cache.fetch(wanted(1), server)
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(contents(1)[:-1] if damage == "truncated" else contents(2))
        assert await cache.fetch(wanted(1), server) == path
        assert path.read_bytes() == contents(1)
        assert server.num_streams == 2
        assert cache.stats.num_corrupt == 1

    asyncio.run(scenario())


def test_errors_of_the_source_pass_through(tmp_path: Path) -> None:
    async def scenario() -> None:
        cache, server = new_cache(tmp_path), Server()
        server.answers = [UnavailableError("coordinator is away"), ConnectionResetError("cut")]
        with pytest.raises(UnavailableError, match="away"):
            await cache.fetch(wanted(1), server)
        with pytest.raises(ConnectionResetError):
            await cache.fetch(wanted(1), server)
        await cache.fetch(wanted(1), server)
        assert server.num_streams == 3

    asyncio.run(scenario())


def test_the_least_recently_used_go_and_the_held_stay(tmp_path: Path) -> None:
    async def scenario() -> None:
        cache, server = new_cache(tmp_path, num_files=3), Server()
        cache.hold(wanted(1).digest)
        for index in (1, 2, 3, 2, 4):
            await cache.fetch(wanted(index), server)
        assert stored(cache) == [1, 2, 4]
        assert cache.stats.num_evicted == 1
        cache.hold(wanted(2).digest)
        cache.hold(wanted(4).digest)
        with pytest.raises(MachineError, match="in use.*--disk-limit") as caught:
            await cache.fetch(wanted(5), server)
        assert caught.value.code == ErrorCode.DISK_FULL
        assert stored(cache) == [1, 2, 4]
        cache.release(wanted(1).digest)
        await cache.fetch(wanted(5), server)
        assert stored(cache) == [2, 4, 5]
        with pytest.raises(ValueError, match="not held"):
            cache.release(wanted(1).digest)

    asyncio.run(scenario())


def test_files_of_unknown_size_keep_the_limit(tmp_path: Path) -> None:
    async def scenario() -> None:
        cache, server = new_cache(tmp_path, num_files=2), Server()
        for index in (1, 2):
            await cache.fetch(wanted(index), server)
        unknown = WantedFile(name="manifest 3", digest=wanted(3).digest, max_bytes=2**20)
        await cache.fetch(unknown, server)
        assert stored(cache) == [2, 3]

    asyncio.run(scenario())


def test_a_new_process_takes_over(tmp_path: Path) -> None:
    async def scenario() -> None:
        cache, server = new_cache(tmp_path), Server()
        for index in (1, 2, 3):
            path = await cache.fetch(wanted(index), server)
            os.utime(path, (index, index))
        (tmp_path / "cache" / "half.part").write_bytes(b"left by a crash")
        (tmp_path / "cache" / "notes.txt").write_bytes(b"not ours")
        again = new_cache(tmp_path, num_files=2)
        assert stored(again) == [2, 3]
        assert sorted(p.name for p in (tmp_path / "cache").iterdir() if p.suffix) == ["notes.txt"]
        await again.fetch(wanted(2), server)
        assert server.num_streams == 3
        await again.fetch(wanted(4), server)
        assert stored(again) == [2, 4]

    asyncio.run(scenario())


def test_a_full_disk_is_reported_and_nothing_half_written_stays(tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk."""

    async def scenario() -> None:
        cache, server = new_cache(tmp_path), Server()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE_BYTES // 2, hard))
        try:
            with pytest.raises(MachineError, match="no room left") as caught:
                await cache.fetch(wanted(1), server)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.code == ErrorCode.DISK_FULL
        assert os.listdir(tmp_path / "cache") == []
        await cache.fetch(wanted(1), server)

    asyncio.run(scenario())


def test_a_folder_that_cannot_be_used_is_reported(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(MachineError, match="cannot be used"):
        new_cache(tmp_path)
