"""Numbers with their nouns."""

from protos.contract.text import counted


def test_one_is_singular() -> None:
    found = [counted(number, "live peer") for number in (0, 1, 2, 1200)]
    assert found == ["0 live peers", "1 live peer", "2 live peers", "1,200 live peers"]
