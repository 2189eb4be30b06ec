"""Where text comes from: SOURCE strings become ordered lists of documents, and every file left out
has a reason.

A SOURCE is `stdlib:` (the `.py` files of this Python's standard library, tests left out), a text
file, or a folder that is read recursively. Options go in front:
`weight=2,encoding=latin-1,name=letters,licence=CC0-1.0:/path`.

A source is scanned once: every file is read, decoded and hashed, but only name, size and digest are
kept, so memory does not grow with the corpus; later stages read a document again and refuse it when
its digest changed. Symbolic links inside a folder are never followed: a target inside the folder is
read under its own name, a target outside is not part of what the operator named. So no loop can
exist and the order (bytes of the relative path) is the same on every file system.
"""

import codecs
import hashlib
import os
import platform
import re
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from protos.contract.errors import CorruptDataError, ErrorCode, MachineError, UsageError

STDLIB = "stdlib:"
"""SOURCE that needs no download: about 12 MB in every Python installation."""

MAX_FILE_BYTES = 2**30
"""Larger files are left out: a file is decoded in one piece."""

MAX_NAMED_FILES = 5
"""Files named per reason in a report; the rest is only counted."""

_STDLIB_FOLDERS_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
_OPTIONS_PATTERN = re.compile(r"((?:[a-z]+=[^,:=]+)(?:,[a-z]+=[^,:=]+)*):(.+)", re.DOTALL)
_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}")


class SkipReason(StrEnum):
    """Why a file was left out."""

    EMPTY = "EMPTY"
    BINARY = "BINARY"
    NOT_IN_ENCODING = "NOT_IN_ENCODING"
    UNREADABLE = "UNREADABLE"
    TOO_LARGE = "TOO_LARGE"
    DUPLICATE = "DUPLICATE"
    HIDDEN = "HIDDEN"
    SYMLINK_INSIDE = "SYMLINK_INSIDE"
    SYMLINK_OUTSIDE = "SYMLINK_OUTSIDE"
    SYMLINK_BROKEN = "SYMLINK_BROKEN"
    NOT_A_FILE = "NOT_A_FILE"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """A parsed SOURCE string."""

    location: str
    """`stdlib:` or a path."""
    weight: float | None = None
    """Share in the mixture relative to the other sources; None: as many tokens as it has."""
    encoding: str = "utf-8"
    name: str = ""
    """Empty: derived from the location."""
    licence: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One file that will be part of the corpus."""

    name: str
    """Path relative to the source."""
    path: Path
    encoding: str
    num_text_bytes: int
    """Bytes of the text in UTF-8."""
    text_digest: bytes
    """SHA-256 of the text in UTF-8."""

    def load_text(self) -> str:
        """Read the text again. Raises CorruptDataError if it is not what was scanned."""
        try:
            text = self.path.read_bytes().decode(self.encoding)
        except (OSError, UnicodeDecodeError) as error:
            raise _changed(self.path, str(error)) from error
        if hashlib.sha256(text.encode()).digest() != self.text_digest:
            raise _changed(self.path, "its text is another")
        return text


@dataclass(slots=True, kw_only=True)
class SkipCounter:
    """How many files were left out for which reason, and the first few names of each."""

    num_by_reason: dict[str, int] = field(default_factory=dict)
    names_by_reason: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: SkipReason, name: str) -> None:
        """Count one file."""
        self.num_by_reason[reason] = self.num_by_reason.get(reason, 0) + 1
        names = self.names_by_reason.setdefault(reason, [])
        if len(names) < MAX_NAMED_FILES:
            names.append(_printable(name))

    def summary(self) -> str:
        """One sentence with counts and examples; empty when nothing was left out."""
        parts = [
            f"{count} {reason} (such as {', '.join(self.names_by_reason[reason][:2])})"
            for reason, count in sorted(self.num_by_reason.items())
        ]
        return ", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A scanned source: its documents in path order."""

    name: str
    origin: str
    """For people and the manifest; holds no path of this machine."""
    licence: str
    weight: float | None
    documents: tuple[Document, ...]
    skipped: SkipCounter


def parse_source(text: str) -> SourceSpec:
    """Parse one SOURCE string. Raises UsageError for unknown options, encodings and bad weights."""
    match = _OPTIONS_PATTERN.fullmatch(text)
    if match is None or os.path.lexists(text):
        return SourceSpec(location=text)
    option_by_key = dict(part.split("=", 1) for part in match.group(1).split(","))
    unknown = sorted(set(option_by_key) - {"weight", "encoding", "name", "licence"})
    if unknown:
        raise UsageError(
            f"source {text!r} has the option {unknown[0]!r}",
            allowed="options are weight, encoding, name and licence",
            remedy="write for example weight=2,encoding=latin-1:PATH",
        )
    return SourceSpec(
        location=match.group(2),
        weight=_parse_weight(option_by_key.get("weight")),
        encoding=_parse_encoding(option_by_key.get("encoding", "utf-8")),
        name=_parse_name(option_by_key.get("name", "")),
        licence=option_by_key.get("licence", ""),
    )


def scan_sources(texts: Sequence[str]) -> tuple[Source, ...]:
    """Scan all SOURCE strings in the order given; of equal documents only the first is kept.

    Raises UsageError when a source does not exist or has no usable text, MachineError without a
    standard library.
    """
    if not texts:
        raise UsageError(
            "no source was named",
            allowed="one or more of stdlib:, a text file, a folder",
            remedy=f"name a source, for example {STDLIB}",
        )
    specs = [parse_source(text) for text in texts]
    if len({spec.weight is None for spec in specs}) > 1:
        raise UsageError(
            "some sources have a weight and some have none",
            allowed="a weight for every source, or for none (then each counts by its tokens)",
            remedy="add weight=... to the others",
        )
    seen_digests: set[bytes] = set()
    sources: list[Source] = []
    for spec in specs:
        source = _scan_source(spec, seen_digests=seen_digests, names={s.name for s in sources})
        if not source.documents:
            raise UsageError(
                f"source {_printable(spec.location)!r} has no usable text: "
                f"{source.skipped.summary() or 'no files'}",
                allowed="at least one non-empty text file in the declared encoding",
                remedy="name another file or folder, or declare encoding=NAME:PATH",
            )
        sources.append(source)
    return tuple(sources)


def scan_file(path: Path, *, encoding: str) -> tuple[bytes, int] | SkipReason:
    """Read and check one file: (digest, size) of its text in UTF-8, or why it is left out."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return SkipReason.NOT_A_FILE
        if status.st_size > MAX_FILE_BYTES:
            return SkipReason.TOO_LARGE
        data = path.read_bytes()
    except OSError:
        return SkipReason.UNREADABLE
    if not data:
        return SkipReason.EMPTY
    is_utf8 = codecs.lookup(encoding).name == "utf-8"
    if is_utf8 and b"\0" in data:
        return SkipReason.BINARY
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return SkipReason.NOT_IN_ENCODING
    if "\0" in text:
        return SkipReason.BINARY
    if not text.strip():
        return SkipReason.EMPTY
    try:
        text_bytes = data if is_utf8 else text.encode()
    except UnicodeEncodeError:
        return SkipReason.NOT_IN_ENCODING
    return hashlib.sha256(text_bytes).digest(), len(text_bytes)


def _scan_source(spec: SourceSpec, *, seen_digests: set[bytes], names: set[str]) -> Source:
    skipped = SkipCounter()
    if spec.location == STDLIB:
        root = stdlib_folder()
        files = _stdlib_files(root, skipped)
        name, licence = "stdlib", "PSF-2.0"
        origin = f"standard library of Python {platform.python_version()}, tests left out"
    else:
        root = _existing_path(spec.location)
        files = iter([root]) if root.is_file() else _folder_files(root, root, skipped)
        name, licence = _name_from_path(root), "unstated"
        origin = f"{'file' if root.is_file() else 'folder'} {_printable(root.name) or '/'}"
    documents = []
    relative_and_path = [
        (path.name if path == root else os.path.relpath(path, root), path) for path in files
    ]
    relative_and_path.sort(key=lambda pair: os.fsencode(pair[0]))
    for relative, path in relative_and_path:
        found = scan_file(path, encoding=spec.encoding)
        if isinstance(found, SkipReason):
            skipped.add(found, relative)
            continue
        text_digest, num_text_bytes = found
        if text_digest in seen_digests:
            skipped.add(SkipReason.DUPLICATE, relative)
            continue
        seen_digests.add(text_digest)
        documents.append(
            Document(
                name=relative,
                path=path,
                encoding=spec.encoding,
                num_text_bytes=num_text_bytes,
                text_digest=text_digest,
            )
        )
    return Source(
        name=_unique_name(spec.name or name, names),
        origin=origin,
        licence=spec.licence or licence,
        weight=spec.weight,
        documents=tuple(documents),
        skipped=skipped,
    )


def scan_summary(sources: Sequence[Source]) -> str:
    """One line for people: how much text was found, and what was left out for which reason."""
    documents = [document for source in sources for document in source.documents]
    num_mib = sum(document.num_text_bytes for document in documents) / 2**20
    left_out = ", ".join(filter(None, (source.skipped.summary() for source in sources)))
    found = f"{len(documents)} documents of {num_mib:.1f} MiB"
    return f"{found}; left out: {left_out}" if left_out else found


def stdlib_folder() -> Path:
    """Folder of this Python's standard library. Raises MachineError when it holds no sources."""
    folder = Path(sysconfig.get_path("stdlib"))
    if not (folder / "os.py").is_file():
        raise MachineError(
            f"{folder} holds no Python sources",
            allowed="a Python whose standard library lies in a folder of .py files",
            remedy="name a text file or a folder as source",
        )
    return folder.resolve()


def _stdlib_files(root: Path, skipped: SkipCounter) -> Iterator[Path]:
    for path in _folder_files(root, root, skipped, left_out=_STDLIB_FOLDERS_LEFT_OUT):
        if path.suffix == ".py":
            yield path


def _folder_files(
    folder: Path, root: Path, skipped: SkipCounter, *, left_out: frozenset[str] = frozenset()
) -> Iterator[Path]:
    """All files below `folder` that are not hidden; links are counted, not followed."""
    pending = [folder]
    while pending:
        current = pending.pop()
        try:
            entries = sorted(os.scandir(current), key=lambda entry: os.fsencode(entry.name))
        except OSError:
            skipped.add(SkipReason.UNREADABLE, os.path.relpath(current, root))
            continue
        for entry in entries:
            relative = os.path.relpath(entry.path, root)
            if entry.name.startswith("."):
                skipped.add(SkipReason.HIDDEN, relative)
            elif entry.is_symlink():
                skipped.add(_link_reason(Path(entry.path), root), relative)
            elif entry.is_dir(follow_symlinks=False):
                if entry.name not in left_out:
                    pending.append(Path(entry.path))
            else:
                yield Path(entry.path)


def _link_reason(path: Path, root: Path) -> SkipReason:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        return SkipReason.SYMLINK_BROKEN
    return SkipReason.SYMLINK_INSIDE if target.is_relative_to(root) else SkipReason.SYMLINK_OUTSIDE


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _existing_path(location: str) -> Path:
    if not location.strip():  # a variable that is not set would be the current folder
        raise UsageError(
            "an empty source",
            allowed=f"{STDLIB}, a text file or a folder",
            remedy="name one; . is the current folder",
        )
    try:
        path = Path(location).expanduser().resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"source {_printable(location)!r} cannot be opened: {_reason(error)}",
            allowed=f"{STDLIB}, a text file or a folder",
            remedy="check the path",
        ) from error
    if not path.is_file() and not path.is_dir():
        raise UsageError(
            f"source {_printable(location)!r} is neither a file nor a folder",
            allowed=f"{STDLIB}, a text file or a folder",
            remedy="name a regular file",
        )
    return path


def _parse_weight(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 < weight < float("inf"):
        raise UsageError(
            f"weight {text!r}",
            allowed="a number above 0",
            remedy="leave it out to count the source by its tokens",
        )
    return weight


def _parse_encoding(text: str) -> str:
    try:
        b"a".decode(text, "replace")  # refuses rot13 and other codecs that do not give text
        return codecs.lookup(text).name
    except LookupError as error:
        raise UsageError(
            f"encoding {text!r} is unknown",
            allowed="a text encoding of Python's codecs, such as utf-8, latin-1, utf-16",
            remedy="correct the name",
        ) from error


def _parse_name(text: str) -> str:
    if text and not _NAME_PATTERN.fullmatch(text):
        raise UsageError(
            f"source name {text!r}",
            allowed="1 to 64 letters, digits, spaces, dots, hyphens and underscores",
            remedy="choose another name",
        )
    return text


def _name_from_path(path: Path) -> str:
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", path.name).strip("-._")[:60]
    return cleaned or "text"


def _unique_name(name: str, taken: set[str]) -> str:
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def _printable(name: str) -> str:
    return name.encode("ascii", "backslashreplace").decode()


def _changed(path: Path, why: str) -> CorruptDataError:
    return CorruptDataError(
        f"{_printable(str(path))} changed while the corpus was built: {why}",
        allowed="files that stay as they are during the build",
        remedy="build again when nobody writes to the source",
        code=ErrorCode.DATA_CORRUPT,
    )
