"""Checkpoints from mirrors: a torn transfer goes on where it broke off, and nothing counts but the
state that the coordinator's signed index names.
"""

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from peer.checkpoint.store import open_checkpoint, save_checkpoint
from peer.daemon.duties import Duties
from peer.daemon.mirrors import fetch_from_mirrors
from peer.metrics import PeerMetrics
from protos.contract.checkpoint_index import INDEX_NAME, CheckpointIndex
from protos.contract.errors import CorruptDataError, UnavailableError
from protos.contract.signing import SigningKey
from tests.peer.checkpoint.test_store import damage, state
from tests.peer.daemon.test_duties import no_trial

COORDINATOR, SOMEBODY = SigningKey(b"\x01" * 32), SigningKey(b"\x02" * 32)
RUN_ID = "demo"
TORN_BYTES = 200_000


def make_mirror(folder: Path, outer_step: int, *, key: SigningKey = COORDINATOR) -> Path:
    """A folder as the coordinator keeps it; returns the checkpoint's file."""
    folder.mkdir()
    header, vectors = state(outer_step)
    path = folder / f"1-{outer_step}.safetensors"
    save_checkpoint(path, header, vectors)
    index = CheckpointIndex(
        run_id=RUN_ID,
        incarnation=1,
        outer_step=outer_step,
        state_digest=header.state_digest.hex(),
        file_name=path.name,
        total_bytes=path.stat().st_size,
    )
    (folder / INDEX_NAME).write_bytes(index.signed(key))
    return path


@contextmanager
def serving(folder: Path, *, num_torn: int) -> Iterator[tuple[str, list[str]]]:
    """A web server of which the first answers with a checkpoint break off; yields its address and
    the ranges that were asked for.
    """
    ranges: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            data, begin = path.read_bytes(), 0
            if path.name != INDEX_NAME:
                ranges.append(self.headers.get("Range", ""))
                wanted = re.fullmatch(r"bytes=(\d+)-", ranges[-1])
                begin = int(wanted[1]) if wanted else 0
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(data) - begin))
            self.end_headers()
            is_torn = path.name != INDEX_NAME and len(ranges) <= num_torn
            self.wfile.write(data[begin : begin + TORN_BYTES] if is_torn else data[begin:])

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", ranges
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def fetch(
    urls: list[str], folder: Path, *, max_outer_step: int = 0
) -> tuple[Path, CheckpointIndex]:
    folder.mkdir(exist_ok=True)
    return fetch_from_mirrors(
        urls,
        folder,
        run_id=RUN_ID,
        public_key=COORDINATOR.public_key,
        max_outer_step=max_outer_step,
    )


def test_a_torn_file_is_finished_and_is_right(tmp_path: Path) -> None:
    source = make_mirror(tmp_path / "mirror", 5)
    with serving(source.parent, num_torn=2) as (url, ranges):
        path, index = fetch([url], tmp_path / "tmp")
    assert ranges == ["", f"bytes={TORN_BYTES}-", f"bytes={2 * TORN_BYTES}-"]
    assert path.read_bytes() == source.read_bytes()
    assert (index.incarnation, index.outer_step) == (1, 5)
    assert open_checkpoint(path)[0].state_digest.hex() == index.state_digest
    assert list((tmp_path / "tmp").iterdir()) == [path]


def test_what_one_mirror_began_another_finishes(tmp_path: Path) -> None:
    source = make_mirror(tmp_path / "mirror", 5)
    with (
        serving(source.parent, num_torn=99) as (torn, _),
        serving(source.parent, num_torn=0) as (whole, ranges),
    ):
        with pytest.raises(UnavailableError, match="bytes"):
            fetch([torn], tmp_path / "tmp")
        path, _ = fetch([whole], tmp_path / "tmp")
    assert ranges == [f"bytes={3 * TORN_BYTES}-"]
    assert path.read_bytes() == source.read_bytes()


def test_nothing_false_is_taken_and_the_next_mirror_is_asked(tmp_path: Path) -> None:
    damaged = make_mirror(tmp_path / "damaged", 6)
    damage(damaged, damaged.stat().st_size // 2)
    make_mirror(tmp_path / "unsigned", 6, key=SOMEBODY)
    other = make_mirror(tmp_path / "other", 6)  # another state under the index's name
    header, vectors = state(7)
    save_checkpoint(other, header, vectors)
    (tmp_path / "nonsense").mkdir()
    (tmp_path / "nonsense" / INDEX_NAME).write_bytes(b"[1]")
    newer, right = make_mirror(tmp_path / "newer", 9), make_mirror(tmp_path / "right", 5)
    bad = ["damaged", "unsigned", "other", "nonsense", "newer", "absent"]
    urls = [(tmp_path / name).as_uri() for name in bad]
    with pytest.raises(UnavailableError) as refused:
        fetch(urls, tmp_path / "tmp", max_outer_step=8)
    for word in ("digest", "did not sign", "7", "does not parse", "outer step 9", "No such file"):
        assert word in str(refused.value), word
    assert not list((tmp_path / "tmp").glob("download-*"))
    path, index = fetch([*urls, right.parent.as_uri()], tmp_path / "tmp", max_outer_step=8)
    assert index.outer_step == 5 and path.read_bytes() == right.read_bytes()
    assert fetch([newer.parent.as_uri()], tmp_path / "tmp")[1].outer_step == 9


def test_an_index_belongs_to_one_run_and_one_folder(tmp_path: Path) -> None:
    make_mirror(tmp_path / "mirror", 5)
    data = (tmp_path / "mirror" / INDEX_NAME).read_bytes()
    public_key = COORDINATOR.public_key
    index = CheckpointIndex.opened(data, public_key=public_key, run_id=RUN_ID)
    with pytest.raises(CorruptDataError, match="of run"):
        CheckpointIndex.opened(data, public_key=public_key, run_id="another")
    with pytest.raises(CorruptDataError, match="did not sign"):
        CheckpointIndex.opened(data.replace(b"1-5", b"1-6"), public_key=public_key, run_id=RUN_ID)
    assert index.file_name == "1-5.safetensors"


class _AwayClient:
    """A coordinator that does not answer, after a while."""

    def __init__(self) -> None:
        self.num_calls = 0

    async def fetch_checkpoint(self, *, max_outer_step: int) -> AsyncIterator[Any]:
        self.num_calls += 1
        await asyncio.sleep(0)
        raise UnavailableError("nobody answers")
        yield


def test_mirrors_follow_the_coordinator_and_one_fetch_runs_at_a_time(tmp_path: Path) -> None:
    make_mirror(tmp_path / "mirror", 5)
    client, sent = _AwayClient(), []

    def send(*arguments: Any, **fields: Any) -> bool:
        sent.append(fields)
        return True

    duties = Duties(
        client,  # type: ignore[arg-type]
        tmp=tmp_path,
        send=send,
        metrics=PeerMetrics(),
        feed=lambda _: None,
        run_trial=no_trial,
        mirrors=lambda most: fetch([(tmp_path / "mirror").as_uri()], tmp_path, max_outer_step=most),
    )

    async def scenario() -> None:
        await asyncio.gather(*(duties.fetch_checkpoint(max_outer_step=7) for _ in range(3)))
        assert client.num_calls == 1, "asked again while one is on its way"
        await duties.fetch_checkpoint(max_outer_step=4)

    asyncio.run(scenario())
    assert client.num_calls == 2
    (told,) = sent
    assert (told["incarnation"], told["outer_step"]) == (1, 5)
    header, _ = state(5)
    assert told["state_digest"] == header.state_digest
