"""Durable memory of votes and promises: an append-only file per incarnation, fsynced before
anything is sent.

The folder is that of one run: numbers of incarnations say nothing across runs. Each line is a
record of one outer step with its checksum; the last line of a step counts. A torn last line, from a
crash while writing, is cut off at start: nothing that it says was ever sent. A line before it that
is damaged held what was sent, so the file is refused: a forgotten vote could be cast twice. Files
of older incarnations are removed when a newer incarnation begins, and the file is rewritten when it
has grown, keeping the newest steps.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from peer.swarm.durable_file import sync_folder
from peer.swarm.round_types import RoundRecord
from protos.contract.errors import CorruptDataError, ErrorCode, MachineError
from protos.muster.v1 import common_pb2, rounds_pb2

_MAX_FILE_BYTES = 8 * 2**20
_NUM_KEPT_STEPS = 8


class VoteFile:
    """Records of one incarnation."""

    def __init__(self, folder: Path, *, incarnation: int) -> None:
        """Open or create the file; drops what older incarnations have left. Raises CorruptDataError
        if another line than the last is damaged.
        """
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = folder / f"votes-{incarnation}.jsonl"
        self._incarnation = incarnation
        for path in folder.glob("votes-*.jsonl"):
            number = path.stem.partition("-")[2]
            if number.isdigit() and int(number) < incarnation:
                path.unlink(missing_ok=True)
        self._record_by_step: dict[int, RoundRecord] = {}
        num_good_bytes = self._read()
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, num_good_bytes)
        os.lseek(self._fd, num_good_bytes, os.SEEK_SET)
        for entered in (folder, *folder.parents[:2]):
            sync_folder(entered)

    def record(self, outer_step: int) -> RoundRecord:
        """What was promised, led and voted for a step; blank if nothing."""
        blank = RoundRecord(incarnation=self._incarnation, outer_step=outer_step)
        return self._record_by_step.get(outer_step, blank)

    def write(self, record: RoundRecord) -> None:
        """Append a record and wait until it is on disk. Raises MachineError."""
        assert record.incarnation == self._incarnation
        self._record_by_step[record.outer_step] = record
        try:
            if os.lseek(self._fd, 0, os.SEEK_CUR) > _MAX_FILE_BYTES:
                self._rewrite()
            else:
                _write_all(self._fd, _line(record))
                os.fdatasync(self._fd)
        except OSError as error:
            raise MachineError(
                f"cannot write {self._path}: {error}",
                allowed="a vote leaves only when it is on disk",
                remedy="free some space or choose another --home",
                code=ErrorCode.DISK_FULL,
            ) from error

    def _read(self) -> int:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return 0
        *lines, rest = data.split(b"\n")
        num_good_bytes = 0
        for number, line in enumerate(lines, start=1):
            body = _checked_body(line)
            if body is None and number == len(lines) and not rest:
                break
            try:
                record = _record_from_body(body, incarnation=self._incarnation)
            except (ValueError, KeyError, TypeError, DecodeError) as error:
                raise CorruptDataError(
                    f"{self._path} is damaged in line {number} of {len(lines)}: {error}",
                    allowed="the votes and promises that this peer has written; only the last line "
                    "may be torn",
                    remedy="check this disk, and join as a new peer with another --home and an "
                    "unused token: with the old key, a vote that this file forgot could be cast "
                    "twice",
                ) from error
            self._record_by_step[record.outer_step] = record
            num_good_bytes += len(line) + 1
        return num_good_bytes

    def _rewrite(self) -> None:
        kept = sorted(self._record_by_step)[-_NUM_KEPT_STEPS:]
        self._record_by_step = {step: self._record_by_step[step] for step in kept}
        temporary = self._path.with_suffix(".tmp")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o600)
        for step in kept:
            _write_all(fd, _line(self._record_by_step[step]))
        os.fdatasync(fd)
        os.replace(temporary, self._path)
        sync_folder(self._path.parent)
        os.close(self._fd)
        self._fd = fd

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def _line(record: RoundRecord) -> bytes:
    vote, directive = record.highest_vote, record.next_directive
    plain: dict[str, Any] = {
        "outer_step": record.outer_step,
        "promised_attempt": record.promised_attempt,
        "led_attempt": record.led_attempt,
        "highest_vote": vote.SerializeToString().hex() if vote is not None else "",
        "contributions": record.contributions.hex(),
        "next_directive": directive.SerializeToString().hex() if directive is not None else "",
    }
    body = json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(body).hexdigest()[:16].encode() + b" " + body + b"\n"


def _checked_body(line: bytes) -> bytes | None:
    """What a line says; None if that is not what was written."""
    checksum, _, body = line.partition(b" ")
    return body if hashlib.sha256(body).hexdigest()[:16].encode() == checksum else None


def _record_from_body(body: bytes | None, *, incarnation: int) -> RoundRecord:
    """Raises ValueError, KeyError, TypeError, DecodeError for what no `_line` says."""
    if body is None:
        raise ValueError("its checksum is another")
    plain = json.loads(body)
    vote, directive = bytes.fromhex(plain["highest_vote"]), bytes.fromhex(plain["next_directive"])
    return RoundRecord(
        incarnation=incarnation,
        outer_step=plain["outer_step"],
        promised_attempt=plain["promised_attempt"],
        led_attempt=plain["led_attempt"],
        highest_vote=rounds_pb2.Vote.FromString(vote) if vote else None,
        contributions=bytes.fromhex(plain["contributions"]),
        next_directive=common_pb2.Signed.FromString(directive) if directive else None,
    )


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
