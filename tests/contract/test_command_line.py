"""What both programs share around their commands, through both programs as a person meets them."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import typer

from coordinator.cli.main import app as coordinator_app
from coordinator.cli.options import print_json as coordinator_json
from coordinator.cli.options import print_table
from coordinator.cli.up_view import UpView
from peer.cli.join import make_reporter
from peer.cli.main import app as peer_app
from peer.cli.options import print_json as peer_json
from peer.daemon.reports import Report
from protos.contract.command_line import ReaderGoneError, checked_output, run_program
from protos.contract.errors import UnavailableError

APP_BY_NAME = {"muster-coordinator": coordinator_app, "muster-peer": peer_app}


@contextmanager
def pipe_without_reader() -> Iterator[int]:
    """The end to write into."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        yield writer
    finally:
        os.close(writer)


@pytest.mark.parametrize("side", ["coordinator", "peer"])
def test_a_closed_pipe_ends_a_program_quietly(side: str) -> None:
    with pipe_without_reader() as writer:
        done = subprocess.run(
            [sys.executable, "-m", f"{side}.cli.main", "--help"],
            stdout=writer, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=60,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, b"")


def test_many_lines_end_with_the_first_that_nobody_reads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []

    def command() -> None:
        for line in range(100_000):
            print(f"line {line}")
            printed.append(line)

    with pipe_without_reader() as writer, os.fdopen(os.dup(writer), "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as end:
            run_program(command)
        assert sys.stdout is stdout
    assert end.value.code == 141 and len(printed) < 10_000
    assert capsys.readouterr().err == ""


def test_another_error_is_told_though_nobody_reads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        print("some of the output")
        raise UnavailableError("found", allowed="allowed", remedy="remedy")

    with pipe_without_reader() as writer, os.fdopen(os.dup(writer), "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as end:
            run_program(command)
    assert end.value.code == 6
    assert capsys.readouterr().err == "error: found\n  allowed: allowed\n  remedy:  remedy\n"


@pytest.mark.parametrize("num_lines", [1, 100_000])
def test_the_code_of_a_command_is_shown_though_nobody_reads(
    num_lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is noticed by the command or at the end."""

    def command() -> int:
        with suppress(ReaderGoneError):
            for line in range(num_lines):
                print(f"line {line}")
        return 3

    with pipe_without_reader() as writer, os.fdopen(os.dup(writer), "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as end:
            run_program(command)
    assert end.value.code == 3


@pytest.mark.parametrize("is_json", [False, True])
def test_a_peer_leaves_when_nobody_reads_its_events(
    is_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In good order, as after Ctrl+C, and the exit code still says why."""
    asked = []
    monkeypatch.setattr(signal, "raise_signal", asked.append)
    with pipe_without_reader() as writer, os.fdopen(os.dup(writer), "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(ReaderGoneError), checked_output():
            report = make_reporter(is_json=is_json)
            for step in range(3):
                report(Report(kind="state", text=f"step {step}"))
    assert asked == [signal.SIGTERM]


def test_a_broken_pipe_elsewhere_is_no_silent_end(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @app.command()
    def command() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(SystemExit) as end:
        run_program(lambda: app(args=[], standalone_mode=False))
    shown = capsys.readouterr().err
    assert end.value.code == 1 and "Traceback" in shown and "internal error" in shown


def refused(name: str, arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Standard error of a command line that the parser refuses."""
    app: Any = APP_BY_NAME[name]
    with pytest.raises(SystemExit) as end:
        run_program(lambda: app(args=arguments.split(), prog_name=name, standalone_mode=False))
    assert end.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            "muster-peer joni",
            (
                "no such command 'joni'",
                "one of the commands join, status, doctor, rendezvous, generate, eval, export, "
                "finetune, import",
                "did you mean 'join'? `muster-peer --help` shows what it takes",
            ),
        ),
        (
            "muster-peer import in out --seqlen 5",
            (
                "unknown option --seqlen",
                "--seq-len, --eos-token-id, --json, --help",
                "did you mean --seq-len? `muster-peer import --help` shows what it takes",
            ),
        ),
        (
            "muster-peer import in out three",
            (
                "got unexpected extra argument(s) (three)",
                "muster-peer import [OPTIONS] {folder} {out}",
                "`muster-peer import --help` shows what it takes",
            ),
        ),
        (
            "muster-peer import in",
            (
                "missing argument 'out'",
                "a path: Folder to write",
                "`muster-peer import --help` shows what it takes",
            ),
        ),
        (
            "muster-peer import in out --seq-len many",
            (
                "invalid value for '--seq-len': 'many' is not a valid int",
                "a whole number: Window to train with. [default: the model's, at most 4096]",
                "`muster-peer import --help` shows what it takes",
            ),
        ),
        (
            "muster-peer rendezvous --port 70000",
            (
                "invalid value for '--port': 70000 is not in the range 0<=x<=65535",
                "a whole number from 0 to 65535: TCP port; 0: any",
                "`muster-peer rendezvous --help` shows what it takes",
            ),
        ),
        (
            "muster-peer status --home",
            (
                "option '--home' requires an argument",
                "--home VALUE",
                "add the value; --help shows what each option takes",
            ),
        ),
        (
            "muster-peer status --json=yes",
            (
                "option '--json' does not take a value",
                "--json alone",
                "leave the value out; --help shows what each option takes",
            ),
        ),
        (
            "muster-coordinator run frobnicate",
            (
                "no such command 'frobnicate'",
                "one of the commands create, list, pause, resume, stop, evict",
                "`muster-coordinator run --help` shows what it takes",
            ),
        ),
    ],
)
def test_what_the_parser_refuses_has_three_parts(
    arguments: str, lines: tuple[str, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    name, rest = arguments.split(" ", 1)
    found, allowed, remedy = lines
    assert refused(name, rest, capsys).splitlines() == [
        f"error: {found}", f"  allowed: {allowed}", f"  remedy:  {remedy}",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "rest"), [("muster-peer", ""), ("muster-coordinator", "run")])
def test_no_arguments_show_help(name: str, rest: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Usage:" in refused(name, rest, capsys)


def test_a_full_device_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as end:
            run_program(lambda: print("x" * 100_000))
    assert end.value.code == 4
    assert capsys.readouterr().err.count("error:") == 1


def started(module: str, arguments: str, ends: str, **environment: str) -> tuple[int, str]:
    """Exit code and standard error of a program that a shell starts with these redirections."""
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -m {module} {arguments} {ends}', sys.executable],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=60,
        text=True, env={**os.environ, **environment},
    )  # fmt: skip
    return done.returncode, done.stderr


FULL = "error: cannot write to standard output: No space left on device"
CLOSED = "error: cannot write to standard output: it is closed"


@pytest.mark.parametrize("side", ["coordinator", "peer"])
@pytest.mark.parametrize(
    ("arguments", "ends", "unbuffered", "found"),
    [
        ("--version", ">/dev/full", "1", FULL),
        ("--help", ">/dev/full", "1", FULL),
        ("--help", ">/dev/full", "", FULL),
        ("--version", ">&-", "", CLOSED),
        ("--help", ">&-", "1", CLOSED),
    ],
)
def test_what_cannot_be_written_is_told(
    side: str, arguments: str, ends: str, unbuffered: str, found: str
) -> None:
    code, shown = started(f"{side}.cli.main", arguments, ends, PYTHONUNBUFFERED=unbuffered)
    assert code == 4
    assert [line.split(":")[0].strip() for line in shown.splitlines()] == [
        "error", "allowed", "remedy",
    ]  # fmt: skip
    assert shown.startswith(found)


@pytest.mark.parametrize(
    "show",
    [
        lambda: print_table(["name"], [["value"]]),
        lambda: coordinator_json({}),
        lambda: peer_json({}),
        lambda: typer.echo("a line"),
        lambda: print("a line"),
    ],
)
def test_every_way_to_print_tells_of_a_closed_stream(
    show: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as end:
        run_program(show)
    assert end.value.code == 4 and sys.stdout is None
    assert capsys.readouterr().err.splitlines()[0] == CLOSED


def test_an_interrupt_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @app.command()
    def command() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_program(lambda: app(args=[], standalone_mode=False))
    assert (end.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_the_progress_of_up_ends_it_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    with pipe_without_reader() as writer, open(os.dup(writer), "wb", buffering=0) as raw:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, write_through=True))
        view = UpView(is_terminal=False)
        with pytest.raises(ReaderGoneError):
            view.say("a line")
        view.say("nothing more is printed")
