"""What goes wrong at a stranger's hands: each mistake gives one message in three parts, its
documented exit code, no traceback, and changes nothing.

Every command is a process of its own, as a person starts it. Joining peers end before they start
children.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from protos.contract.channel import JoinString
from tests.e2e.harness import (
    FAST_COORDINATOR,
    ROOT,
    TINY_MODEL,
    Swarm,
    commands,
    environment,
    running_swarm,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

_DROP = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
"""Without these capabilities even root is bound by permissions."""
_UNPRIVILEGED = _DROP if os.geteuid() == 0 else ()
_NO_CHILD = ("--no-rendezvous", "--host", "127.0.0.1", "--port", "0", "--http-port", "0")


def run(side: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """One command of `side` ("coordinator" or "peer")."""
    return commands().run(
        f"{side}.cli.main",
        [str(argument) for argument in arguments],
        environment=environment(),
        directory=Path.cwd(),
    )


def start_and_run(
    side: str, *arguments: object, prefix: tuple[str, ...] = (), code: str = ""
) -> "subprocess.CompletedProcess[str]":
    """The same with an interpreter of its own behind `prefix`; `code` runs before its imports."""
    start = ["-m", f"{side}.cli.main"]
    if code:
        start = ["-c", f"{code}\nfrom {side}.cli.main import main\nmain()"]
    return subprocess.run(
        [*prefix, sys.executable, *start, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


def assert_refused(done: "subprocess.CompletedProcess[str]", exit_code: int, *words: str) -> None:
    """The command ended with this code and one error that has a remedy and says these words."""
    assert done.returncode == exit_code, done.stdout + done.stderr
    assert done.stderr.count("error:") == 1, done.stderr
    assert "  remedy:" in done.stderr and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def write_texts(folder: Path, *, num_files: int = 24) -> Path:
    """A folder of files with different lines."""
    folder.mkdir(parents=True)
    for index in range(num_files):
        lines = [f"line {line} of file {index}: {line * index % 7919}\n" for line in range(200)]
        (folder / f"{index:02}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "texts")


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Iterator[Swarm]:
    """A coordinator with a run that waits for three peers, and its dataset."""
    with running_swarm(tmp_path_factory.mktemp("swarm")) as swarm:
        corpus = swarm.directory / "corpus"
        swarm.run_cli("corpus", "build", str(texts), "--out", str(corpus), "--vocab-size", "400")
        swarm.coordinator = swarm.start(
            "coordinator", "serve", "--data-dir", str(swarm.data_dir), *_NO_CHILD,
            module="coordinator.cli.main", **FAST_COORDINATOR,
        )  # fmt: skip
        swarm.wait(lambda: swarm.read("/healthz"), "the coordinator serves", 30)
        swarm.create_run(corpus, budget_tokens=40_960, batch_tokens=4_096, num_peers=3)
        swarm.wait(lambda: swarm.read("/api/v1/runs")["runs"], "the page shows the run", 10)
        yield swarm


def token(swarm: Swarm, *arguments: str) -> tuple[str, str]:
    """(id, join string) of a new token."""
    where = ("--data-dir", str(swarm.data_dir), "--json")
    made = json.loads(swarm.run_cli("token", "create", *arguments, *where))
    return made["token_id"], made["join_string"]


def join(home: Path, join_string: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`muster-peer join`."""
    return run("peer", "join", join_string, "--home", home, "--threads", 1, *arguments)


# Corpora.


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing", None, "No such file"),
        ("empty.txt", b"", "EMPTY"),
        ("latin-1.txt", "d\u00e9j\u00e0 vu\n".encode("latin-1") * 100, "NOT_IN_ENCODING"),
        ("small.txt", b"hello world\n" * 40, "at least 1024"),
    ],
)
def test_texts_that_make_no_corpus(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = run("coordinator", "corpus", "build", tmp_path / name, "--out", tmp_path / "out")
    assert_refused(done, 2, words)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_loops_and_foreign_bytes_are_left_out_by_name(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    (folder / "again").symlink_to(folder)
    (folder / "left").symlink_to(folder / "right")
    (folder / "right").symlink_to(folder / "left")
    (folder / "old.txt").write_bytes(b"d\xe9j\xe0 vu\n" * 10)
    done = run(
        "coordinator", "corpus", "build", folder, "--out", tmp_path / "out", "--vocab-size", 300
    )
    assert done.returncode == 0, done.stderr
    assert "24 documents" in done.stderr
    for left_out in ("1 NOT_IN_ENCODING (such as old.txt)", "2 SYMLINK_BROKEN", "1 SYMLINK_INSIDE"):
        assert left_out in done.stderr


def test_a_killed_build_leaves_nothing_that_looks_finished(tmp_path: Path, texts: Path) -> None:
    out = tmp_path / "out"
    build = ("corpus", "build", str(ROOT / "coordinator"), str(ROOT / "peer"), "--out", str(out))
    command = [sys.executable, "-m", "coordinator.cli.main", *build]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("training chunks"):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    create = ("run", "create", "--data-dir", tmp_path / "data", "--dataset", out)
    assert_refused(run("coordinator", *create), 2, "no finished corpus", "corpus build")
    done = run("coordinator", "corpus", "build", texts, "--out", out, "--vocab-size", 300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("manifest.json", "changed"),
        ("tokenizer.json", "changed"),
        ("chunks/train-000000.bin", "changed"),
        ("chunks/heldout-000000.bin", "truncated"),
        ("chunks/train-000000.bin", "missing"),
    ],
)
def test_damaged_datasets_become_no_run(
    swarm: Swarm, tmp_path: Path, name: str, damage: str
) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(swarm.directory / "corpus", dataset)
    if damage == "changed":
        data = (dataset / name).read_bytes()
        (dataset / name).write_bytes(data.replace(b"1", b"2", 1))
    elif damage == "truncated":
        os.truncate(dataset / name, 100)
    else:
        (dataset / name).unlink()
    done = run(
        "coordinator", "run", "create", "--data-dir", tmp_path / "data", "--dataset", dataset
    )
    assert_refused(done, 5, Path(name).name)
    assert not (tmp_path / "data").exists()


# Specs.


@pytest.mark.parametrize(
    ("toml", "arguments", "words"),
    [
        ("[model]\nd_modl = 3\n", (), "did you mean 'd_model'?"),
        ("seed = 1\n\xff", (), "is not TOML"),
        ("", ("--budget-tokens", "99999999"), "max_data_passes = 4"),
        ("", ("--set", "strategy.global_batch_tokens=9999872"), "less than one batch"),
        ("", ("--model", "nonsense"), "model 'nonsense'"),
    ],
)
def test_specs_that_make_no_run(
    swarm: Swarm, tmp_path: Path, toml: str, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "run.toml").write_bytes(toml.encode("latin-1"))
    create = ("run", "create", "--data-dir", swarm.data_dir, "--spec", tmp_path / "run.toml")
    done = run("coordinator", *create, "--dataset", swarm.directory / "corpus", *arguments)
    assert_refused(done, 2, words)
    assert len(swarm.read("/api/v1/runs")["runs"]) == 1


def test_settings_that_do_not_exist(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("prot = 1\n")
    where = ("--data-dir", tmp_path / "data")
    assert_refused(run("coordinator", "serve", "--config", config, *where), 2, "mean 'port'?")
    config.write_text("thread = 1\n")
    join_config = ("join", "x", "--home", tmp_path / "home", "--config", config)
    assert_refused(run("peer", *join_config), 2, "mean 'threads'?")
    up = ("up", *where, "--budget-tokens", "-5")
    assert_refused(run("coordinator", *up), 2, "--budget-tokens -5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml"]


# Ports and directories.


def test_ports_that_are_taken(swarm: Swarm, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = str(holder.getsockname()[1])
        serve = ("serve", "--data-dir", tmp_path / "data", *_NO_CHILD)
        for flag in ("--port", "--http-port"):
            done = run("coordinator", *serve, flag, port)
            assert_refused(done, 4, f"127.0.0.1:{port}: Address already in use", f"{flag} PORT")
        done = run("coordinator", *serve, "--with-rendezvous", "--rendezvous-port", port)
        assert_refused(done, 4, f"127.0.0.1:{port}", "--rendezvous-port PORT")
        _, join_string = token(swarm)
        listen = ("--listen-host", "127.0.0.1", "--listen-port", port)
        for arguments in (listen, ("--metrics-port", port)):
            done = join(tmp_path / "home", join_string, *arguments)
            assert_refused(done, 4, f"127.0.0.1:{port}", arguments[-2])
        assert not (tmp_path / "home" / "membership.json").exists()


def test_data_dirs_that_cannot_be_used(swarm: Swarm, tmp_path: Path) -> None:
    done = run("coordinator", "serve", "--data-dir", swarm.data_dir, *_NO_CHILD)
    assert swarm.coordinator is not None
    assert_refused(done, 4, f"in use by process {swarm.coordinator.popen.pid}")
    (tmp_path / "file").write_text("x")
    done = run("coordinator", "serve", "--data-dir", tmp_path / "file", *_NO_CHILD)
    assert_refused(done, 4, "File exists")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    for command in (("serve", *_NO_CHILD), ("up", "--peers", "1"), ("status",)):
        arguments = (*command, "--data-dir", closed)
        done = start_and_run("coordinator", *arguments, prefix=_UNPRIVILEGED)
        assert_refused(done, 4, "permission")
    closed.chmod(0o500)
    done = start_and_run("peer", "join", "--home", closed / "home", prefix=_UNPRIVILEGED)
    assert_refused(done, 4, "Permission denied", "--home")


def test_two_peers_on_one_home(tmp_path: Path) -> None:
    home = tmp_path / "homes" / "first"
    nobody = JoinString(
        address="127.0.0.1:1",
        ca_fingerprint="ab" * 32,
        run_id="run",
        secret="00" * 32,
        expire_unix_seconds=0,
    ).encode()
    with running_swarm(tmp_path) as swarm:
        swarm.join_string = nobody
        first = swarm.start_peer("first")  # and tries for a while to reach somebody
        swarm.wait(lambda: (home / "lock").exists() and (home / "lock").read_text(), "a lock", 20)
        assert_refused(join(home, nobody), 4, f"pid {first.popen.pid}", "--home")
        swarm.wait(lambda: "trying again" in first.tail(), "the first peer goes on", 20)


@contextlib.contextmanager
def small_disk(folder: Path, size_kib: int) -> Iterator[Path]:
    """A file system of its own; skips the test where that is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode != 0:
        pytest.skip(f"mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all the space that is left."""
    path = folder / "filler"
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return path


def test_disks_that_are_full_from_the_start(swarm: Swarm, texts: Path, tmp_path: Path) -> None:
    _, join_string = token(swarm)
    with small_disk(tmp_path / "disk", 256) as disk:
        fill(disk)
        done = run("coordinator", "serve", "--data-dir", disk / "data", *_NO_CHILD)
        assert_refused(done, 4, "full", "free")
        create = ("run", "create", "--data-dir", disk / "run", "--model", TINY_MODEL)
        create = (*create, "--set", "strategy.global_batch_tokens=4096")
        done = run("coordinator", *create, "--dataset", swarm.directory / "corpus")
        assert_refused(done, 4, "full", "free")
        done = run("coordinator", "corpus", "build", texts, "--out", disk / "corpus")
        assert_refused(done, 4, "free")
        assert_refused(join(disk / "home", join_string), 4, "the disk is full", "--home")


def test_a_disk_that_fills_up_loses_nothing(swarm: Swarm, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4096) as disk, running_swarm(disk) as full:
        full.run_cli(
            "run", "create", "--data-dir", str(full.data_dir), "--model", TINY_MODEL, "--dataset",
            str(swarm.directory / "corpus"), "--set", "strategy.global_batch_tokens=4096",
        )  # fmt: skip
        logs = Swarm(tmp_path)
        full.coordinator = logs.start(
            "coordinator", "serve", "--data-dir", str(full.data_dir), *_NO_CHILD,
            module="coordinator.cli.main",
        )  # fmt: skip
        full.wait(lambda: full.read("/healthz"), "the coordinator serves", 30)
        kept, _ = token(full)
        filler = fill(disk)
        create = ("token", "create", "--data-dir", full.data_dir)
        for _ in range(20):  # the log has room of its own for a while
            done = run("coordinator", *create)
            if done.returncode:
                break
        assert_refused(done, 6, "full", "free disk space")
        assert full.coordinator.popen.poll() is None
        assert full.read("/healthz") is not None
        filler.unlink()
        later, _ = token(full)
        listed = json.loads(
            full.run_cli("token", "list", "--data-dir", str(full.data_dir), "--json")
        )
        assert {kept, later} <= {entry["token_id"] for entry in listed["tokens"]}


# Tokens, versions and authorities.


def test_join_strings_that_are_refused(swarm: Swarm, tmp_path: Path) -> None:
    home = tmp_path / "home"
    token_id, good = token(swarm)
    known = JoinString.decode(good)
    assert_refused(join(home, good[:-20]), 2, "join string", "copy it again")
    wrong = {
        "a token that is not known": replace(known, secret="00" * 32),
        "run 'other' is not known": replace(known, run_id="other"),
        "certificate": replace(known, ca_fingerprint="ab" * 32),
    }
    for words, join_string in wrong.items():
        assert_refused(join(home, join_string.encode()), 3, words)
    _, expiring = token(swarm, "--expires", "1s")
    swarm.run_cli("token", "revoke", token_id, "--data-dir", str(swarm.data_dir))
    assert_refused(join(home, good), 3, f"token {token_id} was revoked", "token create")
    end = JoinString.decode(expiring).expire_unix_seconds
    swarm.wait(lambda: time.time() > end, "the token has expired", 5)
    assert_refused(join(home, expiring), 3, "expired", "token create")
    assert not (home / "membership.json").exists()


def test_an_exhausted_token(swarm: Swarm, tmp_path: Path) -> None:
    _, once = token(swarm, "--max-uses", "1")
    done = join(tmp_path / "first", once, "--memory-limit", "1MiB")  # joins, sees the model, leaves
    assert_refused(done, 4, "--memory-limit is 1.0 MiB")
    done = join(tmp_path / "second", once)
    assert_refused(done, 3, "used by 1 keys", "token create")


@pytest.mark.parametrize(
    ("code", "exit_code", "words"),
    [
        ("from protos.contract import ids; ids.PROTOCOL_VERSION = 99", 3, "version"),
        ("import time; real = time.time; time.time = lambda: real() + 5", 3, "clock"),
    ],
)
def test_peers_of_another_version_or_time(
    swarm: Swarm, tmp_path: Path, code: str, exit_code: int, words: str
) -> None:
    _, join_string = token(swarm)
    join_there = ("join", join_string, "--home", tmp_path / "home", "--threads", 1)
    assert_refused(start_and_run("peer", *join_there, code=code), exit_code, words)
