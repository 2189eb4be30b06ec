"""Checkpoints from mirrors, when neither a member nor the coordinator serves the state.

A mirror is a folder behind http, https or file (the operator's --checkpoint-mirror) with the
coordinator's signed index (protos/contract/checkpoint_index.py). A transfer that breaks goes on
where it ended, here or at the next mirror; a file counts only if its state has the digest that the
index names. Blocking: call it from a thread.
"""

import http.client
import logging
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable
from pathlib import Path

from peer.checkpoint.store import open_checkpoint
from protos.contract.checkpoint_index import INDEX_NAME, MAX_INDEX_BYTES, CheckpointIndex
from protos.contract.errors import CorruptDataError, MusterError, UnavailableError

_LOGGER = logging.getLogger(__name__)
_TIMEOUT_SECONDS = 20.0
_READ_BYTES = 2**20
_TRIES = 3
"""Of one mirror's file, each from where the one before broke off."""


def fetch_from_mirrors(
    urls: Iterable[str], folder: Path, *, run_id: str, public_key: bytes, max_outer_step: int
) -> tuple[Path, CheckpointIndex]:
    """Newest checkpoint, not above `max_outer_step` unless that is 0, of the first mirror that has
    a right one. Raises UnavailableError with what was wrong at each.
    """
    problems = []
    for url in urls:
        try:
            return _fetch(
                url.rstrip("/"),
                folder,
                run_id=run_id,
                public_key=public_key,
                max_outer_step=max_outer_step,
            )
        except (MusterError, OSError, http.client.HTTPException, ValueError) as error:
            found = error.found if isinstance(error, MusterError) else str(error) or repr(error)
            problems.append(f"{url}: {found}")
            _LOGGER.warning("checkpoint mirror %s", problems[-1])
    raise UnavailableError(
        "no checkpoint from mirrors: " + ("; ".join(problems) or "the run names none"),
        allowed="a mirror with the coordinator's newest.json and the file that it names",
        remedy="the operator copies the run's checkpoints to a mirror, or a member comes back",
    )


def _fetch(
    url: str, folder: Path, *, run_id: str, public_key: bytes, max_outer_step: int
) -> tuple[Path, CheckpointIndex]:
    with urllib.request.urlopen(f"{url}/{INDEX_NAME}", timeout=_TIMEOUT_SECONDS) as answer:
        data = answer.read(MAX_INDEX_BYTES + 1)
    index = CheckpointIndex.opened(data, public_key=public_key, run_id=run_id)
    if max_outer_step and index.outer_step > max_outer_step:
        raise UnavailableError(
            f"its checkpoint is of outer step {index.outer_step}",
            allowed=f"a checkpoint of outer step {max_outer_step} or before",
            remedy="wait for the mirror to be brought up to date",
        )
    part = folder / f"mirror-{index.state_digest[:32]}.part"
    for older in folder.glob("mirror-*.part"):
        if older != part:
            older.unlink(missing_ok=True)
    for number in range(1, _TRIES + 1):
        try:
            _download(f"{url}/{index.file_name}", part, total_bytes=index.total_bytes)
            break
        except (OSError, http.client.HTTPException) as error:
            if number == _TRIES:
                raise
            _LOGGER.info("%s: %s; going on from where it broke off", url, error or repr(error))
    path = folder / f"download-{uuid.uuid4().hex}.safetensors"
    part.replace(path)
    try:
        _check(path, index)
    except CorruptDataError:
        path.unlink(missing_ok=True)
        raise
    return path, index


def _download(url: str, part: Path, *, total_bytes: int) -> None:
    """Add to `part` until it has so many bytes. Raises OSError if the transfer breaks."""
    held = part.stat().st_size if part.exists() else 0
    if held >= total_bytes:
        return
    request = urllib.request.Request(url)
    if held and not url.startswith("file:"):
        request.add_header("Range", f"bytes={held}-")
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
        is_rest = getattr(answer, "status", None) == http.client.PARTIAL_CONTENT
        with part.open("ab" if is_rest else "wb") as file:
            while data := answer.read(_READ_BYTES):
                file.write(data[: total_bytes - file.tell()])
                if file.tell() >= total_bytes:
                    return
    raise OSError(f"it ended after {part.stat().st_size} of {total_bytes} bytes")


def _check(path: Path, index: CheckpointIndex) -> None:
    """Raise CorruptDataError unless the file holds the state that the index names, by its
    recomputed digest.
    """
    header, _ = open_checkpoint(path)
    found = (header.meta.incarnation, header.meta.outer_step, header.state_digest.hex())
    if found != (index.incarnation, index.outer_step, index.state_digest):
        raise CorruptDataError(
            f"state {found[0]}/{found[1]} with digest {found[2][:16]}...",
            allowed=f"state {index.incarnation}/{index.outer_step} with digest "
            f"{index.state_digest[:16]}..., as the index says",
            remedy="copy the folder from the coordinator's data directory again",
        )
