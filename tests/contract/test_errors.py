"""The error catalogue: every class has its own exit code, every code one number."""

from protos.contract import errors
from protos.contract.errors import ERROR_CLASS_BY_STATUS, ErrorCode, MusterError


def test_exit_codes_are_distinct_and_documented() -> None:
    classes = MusterError.__subclasses__()
    codes = [error.exit_code for error in classes]
    assert len(set(codes)) == len(codes) and 0 not in codes and 130 not in codes
    for error in classes:
        lines = [line for line in (errors.__doc__ or "").splitlines() if error.__name__ in line]
        assert lines and lines[0].rstrip().endswith(f"exit {error.exit_code}"), error


def test_status_of_each_class_leads_back_to_it_or_to_one_that_says_the_same() -> None:
    for error in MusterError.__subclasses__():
        assert error.grpc_status_name in ERROR_CLASS_BY_STATUS


def test_codes_of_the_wire_are_frozen() -> None:
    assert (ErrorCode.INTERNAL, ErrorCode.TOKEN_UNKNOWN, ErrorCode.RUN_FAILED) == (1, 20, 90)
    assert all(isinstance(error.default_code, ErrorCode) for error in MusterError.__subclasses__())


def test_message_joins_what_there_is() -> None:
    error = errors.UsageError("found", allowed="", remedy="remedy")
    assert str(error) == "found; remedy"
    assert error.code is ErrorCode.INVALID_ARGUMENT
