"""What is around the commands of both programs: standard output, messages, exit codes.

A MusterError becomes its three parts on standard error and its exit code; what the parser of
arguments refuses is brought into the same form; anything else is a traceback and exit code 1. A
reader that has seen enough (`| head -1`) is no error: the command ends without a word and with the
exit code that SIGPIPE gives other tools. The parser (typer) is not imported here, as the contract
has no such library: its exceptions are known by what they carry.
"""

import contextlib
import errno
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TextIO, cast

from protos.contract.errors import (
    INTERRUPTED_EXIT_CODE,
    READER_GONE_EXIT_CODE,
    ErrorCode,
    MachineError,
    MusterError,
    UsageError,
)

EXIT_CODES = (
    "Exit codes: 0 done; 1 internal error; 2 wrong flags, files, specs or join strings; 3 refused "
    "by the other side (token, version, clock, CA); 4 this machine (port, disk, permissions, lock, "
    "memory, missing package); 5 corrupt data; 6 cannot be reached or not ready; 7 the run cannot "
    "go on; 130 interrupted; 141 nobody reads the output."
)


_NAME_BY_TYPE = {
    "int": "a whole number",
    "integer": "a whole number",
    "float": "a number",
    "filename": "a path",
    "path": "a path",
}


class ReaderGoneError(SystemExit):
    """Nobody reads standard output any more; ends the program unless somebody has to tidy up."""

    def __init__(self) -> None:
        super().__init__(READER_GONE_EXIT_CODE)


class CheckedOutput:
    """A stream for results that turns what the machine refuses into a MachineError, and a reader
    that is gone into ReaderGoneError; whatever prints (print, typer.echo, sys.stdout.write) goes
    through it once it is sys.stdout. After either, what is written goes nowhere.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_reader_gone = False

    def write(self, text: str) -> int:
        """As a text stream does. Raises MachineError, ReaderGoneError."""
        if text == "":
            return 0  # typer tries with it whether this is a text stream, and drops what is raised
        with self._explained():
            return self._stream.write(text)

    def flush(self) -> None:
        """As a text stream does. Raises MachineError, ReaderGoneError."""
        with self._explained():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError as error:
            self._forget()
            self.is_reader_gone = True
            raise ReaderGoneError from error
        except OSError as error:
            self._forget()
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            is_closed = error.errno == errno.EBADF
            found = "it is closed" if is_closed else error.strerror or error
            raise MachineError(
                f"cannot write to standard output: {found}",
                allowed="a terminal, a pipe, or a file with room",
                remedy="free space there, or send the output elsewhere",
                code=ErrorCode.DISK_FULL if is_full else ErrorCode.PERMISSION_DENIED,
            ) from error

    def _forget(self) -> None:
        """What is buffered goes nowhere, so that Python's last flush does not fail as well."""
        with contextlib.suppress(OSError):  # a stream without a descriptor keeps nothing for later
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def _refusing_stream() -> TextIO:
    """In place of one that was closed by whoever called."""
    return open(os.open(os.devnull, os.O_RDONLY), "w")


@contextlib.contextmanager
def checked_output() -> Iterator[None]:
    """sys.stdout as CheckedOutput, flushed at the end: what cannot be written is said, once. That
    nobody reads is the exit code only of what would else have ended well.
    """
    before = sys.stdout
    checked = CheckedOutput(_refusing_stream() if before is None else before)
    sys.stdout = cast(TextIO, checked)
    try:
        try:
            yield
        except SystemExit as end:
            if end.code:
                with contextlib.suppress(ReaderGoneError):
                    checked.flush()
                raise
        checked.flush()
        if checked.is_reader_gone:  # a command that had to tidy up first
            raise ReaderGoneError
    finally:
        sys.stdout = before
        with contextlib.suppress(MachineError, ReaderGoneError):  # another error is on its way
            checked.flush()


def say(text: str) -> None:
    """A line on standard error, for people; dropped if nobody can read it."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text + "\n")


def report_error(error: MusterError) -> None:
    """Found, allowed, remedy: one line each."""
    say(f"error: {error.found}")
    if error.allowed:
        say(f"  allowed: {error.allowed}")
    if error.remedy:
        say(f"  remedy:  {error.remedy}")


def run_program(command: Callable[[], object]) -> NoReturn:
    """Run a program's command line and exit with its code. `command` is the typer application with
    `standalone_mode=False`: it returns an exit code or None, and raises what it refuses.
    """
    _hold_standard_descriptors()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where an encoding lacks a character
    sys.exit(_exit_code_of(command))


def _hold_standard_descriptors() -> None:
    """Where a standard stream was closed by whoever started this, its descriptor leads nowhere, so
    that no file that is opened later takes its number and what libraries print.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free: this one
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", 1, closefd=False)


def _exit_code_of(command: Callable[[], object]) -> int:
    try:
        with checked_output():
            code = command()
            if code == INTERRUPTED_EXIT_CODE:  # what typer makes of the exception
                raise KeyboardInterrupt
            if isinstance(code, int) and code:
                sys.exit(code)
        return 0
    except MusterError as error:
        report_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED_EXIT_CODE
    except SystemExit as end:
        lost = end.__context__
        if isinstance(end, ReaderGoneError) or not isinstance(lost, BrokenPipeError):
            raise
        return _give_up(lost)  # typer takes every broken pipe for standard output's
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            say(str(error))
            return UsageError.exit_code
        refused = usage_error_from(error)
        if refused is None:
            return _give_up(error)
        report_error(refused)
        return refused.exit_code


def _give_up(error: BaseException) -> int:
    say("".join(traceback.format_exception(error)).rstrip())
    say("error: internal error, please report it with the lines above")
    return 1


def usage_error_from(error: Exception) -> MusterError | None:
    """What the parser of arguments refused, in three parts; None for any other error."""
    say_found = getattr(error, "format_message", None)
    if say_found is None:
        return None
    context = getattr(error, "ctx", None)
    found, _, meant = " ".join(str(say_found()).split()).partition(" Did you mean ")
    found = found[:1].lower() + found[1:].rstrip(".")
    if context is None:  # an option without its value, or with one that it does not take
        name = getattr(error, "option_name", "what was given")
        takes_value = "requires" in found
        return UsageError(
            found,
            allowed=f"{name} VALUE" if takes_value else f"{name} alone",
            remedy=f"{'add the value' if takes_value else 'leave the value out'}; --help shows "
            "what each option takes",
        )
    help_text = f"`{context.command_path} --help` shows what it takes"
    if meant:
        help_text = f"did you mean {meant} {help_text}"
    if hasattr(error, "possibilities") and hasattr(error, "option_name"):
        close = " or ".join(sorted(error.possibilities or ()))
        return UsageError(
            f"unknown option {error.option_name}",
            allowed=_options_of(context),
            remedy=f"did you mean {close}? {help_text}" if close else help_text,
        )
    parameter = getattr(error, "param", None)
    if parameter is not None:
        return UsageError(found, allowed=_values_of(parameter), remedy=help_text)
    if hasattr(context.command, "commands"):
        return UsageError(found, allowed=_commands_of(context), remedy=help_text)
    usage = " ".join(context.command.collect_usage_pieces(context))
    return UsageError(found, allowed=f"{context.command_path} {usage}", remedy=help_text)


def _commands_of(context: Any) -> str:
    commands = context.command.commands.items()
    return "one of the commands " + ", ".join(n for n, command in commands if not command.hidden)


def _options_of(context: Any) -> str:
    names = [
        _long_name(parameter.opts)
        for parameter in context.command.get_params(context)
        if parameter.param_type_name == "option" and not getattr(parameter, "hidden", False)
    ]
    return ", ".join(names)


def _long_name(names: Sequence[str]) -> str:
    return max(names, key=len)


def _values_of(parameter: Any) -> str:
    """What a parameter takes: its choices or range, and its own help."""
    kind = parameter.type
    choices = getattr(kind, "choices", None)
    if choices is not None:
        text = "one of " + ", ".join(str(getattr(c, "value", c)) for c in choices)
    else:
        low, high = getattr(kind, "min", None), getattr(kind, "max", None)
        text = _NAME_BY_TYPE.get(str(kind.name).removesuffix(" range"), "a value")
        text += "" if low is None else f" from {low}"
        text += "" if high is None else f" to {high}"
    described = (getattr(parameter, "help", None) or "").strip().rstrip(".")
    return f"{text}: {described}" if described else text
