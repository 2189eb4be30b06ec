"""Sources: what is read, what is left out and why, in which order."""

import os
import socket
from pathlib import Path

import pytest

from coordinator.corpus.sources import (
    SkipReason,
    Source,
    parse_source,
    scan_file,
    scan_sources,
    stdlib_folder,
)
from protos.contract.errors import CorruptDataError, UsageError


def scan(*texts: str) -> tuple[Source, ...]:
    """Scan SOURCE strings."""
    return scan_sources(texts)


def names(source: Source) -> list[str]:
    """Names of a source's documents."""
    return [document.name for document in source.documents]


def test_a_folder_is_read_recursively_in_path_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("x\n")
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "c.md").write_text("c\n")
    (source,) = scan(str(tmp_path))
    assert names(source) == ["a.txt", "b/x.txt", "c.md"]
    assert [document.load_text() for document in source.documents] == ["a\n", "x\n", "c\n"]
    assert source.skipped.num_by_reason == {}


def test_a_file_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n")
    (source,) = scan(str(tmp_path / "a.txt"))
    assert names(source) == ["a.txt"]
    assert source.name == "a.txt"


def test_every_file_left_out_has_its_reason(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good\n")
    (tmp_path / "copy.txt").write_text("good\n")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_bytes(b" \n\n")
    (tmp_path / "latin.txt").write_bytes("Gr\u00fc\u00dfe\n".encode("latin-1"))
    (tmp_path / "image.bin").write_bytes(b"PNG\0\1\2")
    (tmp_path / ".hidden").write_text("secret\n")
    os.mkfifo(tmp_path / "pipe")
    (source,) = scan(str(tmp_path))
    assert names(source) == ["copy.txt"]
    assert source.skipped.num_by_reason == {
        SkipReason.DUPLICATE: 1,
        SkipReason.EMPTY: 2,
        SkipReason.NOT_IN_ENCODING: 1,
        SkipReason.BINARY: 1,
        SkipReason.HIDDEN: 1,
        SkipReason.NOT_A_FILE: 1,
    }
    assert source.skipped.names_by_reason[SkipReason.NOT_IN_ENCODING] == ["latin.txt"]
    assert "1 BINARY (such as image.bin)" in source.skipped.summary()


def test_an_unreadable_file_is_named() -> None:
    """The kernel refuses to read the first page of a process's memory, root or not."""
    assert scan_file(Path("/proc/self/mem"), encoding="utf-8") is SkipReason.UNREADABLE


def test_a_declared_encoding_is_decoded(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Gr\u00fc\u00dfe\n".encode("latin-1"))
    (source,) = scan(f"encoding=latin-1:{tmp_path}")
    assert source.documents[0].load_text() == "Gr\u00fc\u00dfe\n"
    (tmp_path / "wide.txt").write_bytes("wide\n".encode("utf-16"))
    (source,) = scan(f"encoding=utf-16:{tmp_path / 'wide.txt'}")
    assert source.documents[0].load_text() == "wide\n"


def test_links_are_counted_and_never_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret\n")
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "a.txt").write_text("a\n")
    (root / "sub" / "up").symlink_to(root)
    (root / "again.txt").symlink_to(root / "a.txt")
    (root / "loop-1").symlink_to(root / "loop-2")
    (root / "loop-2").symlink_to(root / "loop-1")
    (root / "gone").symlink_to(root / "nowhere")
    (root / "out").symlink_to(outside)
    (source,) = scan(str(root))
    assert names(source) == ["a.txt"]
    assert source.skipped.num_by_reason == {
        SkipReason.SYMLINK_INSIDE: 2,
        SkipReason.SYMLINK_BROKEN: 3,
        SkipReason.SYMLINK_OUTSIDE: 1,
    }


def test_a_source_may_itself_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.txt").write_text("a\n")
    (tmp_path / "link").symlink_to(tmp_path / "root")
    (source,) = scan(str(tmp_path / "link"))
    assert names(source) == ["a.txt"]


def test_equal_documents_of_two_sources_are_kept_once(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.txt").write_text("same\n")
        (tmp_path / folder / f"{folder}.txt").write_text(f"{folder}\n")
    one, two = scan(str(tmp_path / "one"), str(tmp_path / "two"))
    assert names(one) == ["one.txt", "same.txt"]
    assert names(two) == ["two.txt"]


def test_a_file_that_changes_after_the_scan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before\n")
    (source,) = scan(str(path))
    path.write_text("after\n")
    with pytest.raises(CorruptDataError, match="changed while"):
        source.documents[0].load_text()
    path.unlink()
    with pytest.raises(CorruptDataError, match="changed while"):
        source.documents[0].load_text()


def test_the_standard_library_has_sources_without_tests() -> None:
    (source,) = scan("stdlib:")
    assert "os.py" in names(source)
    assert not [name for name in names(source) if "/test/" in name or name.startswith("test/")]
    assert all(name.endswith(".py") for name in names(source))
    assert sum(document.num_text_bytes for document in source.documents) > 5_000_000
    assert (stdlib_folder() / "json" / "__init__.py").is_file()


@pytest.mark.parametrize(
    "text",
    [
        "weight=0:x",
        "weight=nan:x",
        "weight=many:x",
        "encoding=klingon:x",
        "encoding=rot13:x",
        "colour=red:x",
        "name=../x:x",
    ],
)
def test_bad_options_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_source(text)


def test_options_are_parsed() -> None:
    spec = parse_source("weight=2,encoding=latin-1,name=letters,licence=CC0-1.0:/some/path:1")
    assert (spec.location, spec.weight, spec.name) == ("/some/path:1", 2.0, "letters")
    assert (spec.encoding, spec.licence) == ("iso8859-1", "CC0-1.0")
    assert parse_source("stdlib:").location == "stdlib:"
    assert parse_source("C:\\odd=name").location == "C:\\odd=name"


def test_what_cannot_be_a_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no source"):
        scan()
    with pytest.raises(UsageError, match="cannot be opened"):
        scan(str(tmp_path / "missing"))
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(UsageError, match="cannot be opened"):
        scan(str(loop))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        with pytest.raises(UsageError, match="neither a file nor a folder"):
            scan(str(tmp_path / "socket"))


def test_a_source_without_text_says_what_it_had(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no files"):
        scan(str(tmp_path))
    (tmp_path / "a.bin").write_bytes(b"\0")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UsageError, match=r"1 BINARY .*a\.bin.*1 NOT_IN_ENCODING .*b\.txt"):
        scan(str(tmp_path))


def test_weights_are_for_all_or_none(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"{name}\n")
    with pytest.raises(UsageError, match="some have none"):
        scan(f"weight=2:{tmp_path / 'a'}", str(tmp_path / "b"))


def test_sources_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(f"{folder}\n")
    sources = scan(str(tmp_path / "x" / "a.txt"), str(tmp_path / "y" / "a.txt"))
    assert [source.name for source in sources] == ["a.txt", "a.txt-2"]
