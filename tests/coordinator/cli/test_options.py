"""What every table and command shares."""

import pytest

from coordinator.cli.options import MAX_CELL_CHARACTERS, print_table


def test_a_long_reason_does_not_widen_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["run", "why"], [["a", "word " * 200], ["b", "two\nlines"]])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= len("run  ") + MAX_CELL_CHARACTERS
    assert lines[1].endswith("...") and lines[2] == "b    two lines"
