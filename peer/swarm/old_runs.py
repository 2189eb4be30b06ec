"""States of runs that nobody has worked on for long, in a home that has served several runs.

A state and the averaged bytes beside it are three to ten times the model; the durable votes are
a few kilobytes and are never removed, because a vote that was forgotten could be cast twice.
"""

import shutil
from pathlib import Path

KEPT_DAYS = 30.0
"""Well above the half hour that a run's peers go on without a coordinator: whoever comes back later
takes the state from members or from the coordinator.
"""
_FOLDERS = ("state", "averaged")
_DAY_SECONDS = 86_400.0


def prune_old_runs(home: Path, *, own_run_folder: str, now_unix_seconds: float) -> list[str]:
    """Remove folders of other runs in which nothing was written for KEPT_DAYS; returns a sentence
    for each. What cannot be removed stays.
    """
    done = []
    for kind in _FOLDERS:
        for folder in sorted((home / kind).glob("*/")):
            if folder.name == own_run_folder or folder.is_symlink():
                continue
            files = [path.stat() for path in folder.rglob("*")]
            newest_unix_seconds = max(
                [folder.stat().st_mtime, *(found.st_mtime for found in files)]
            )
            age_days = (now_unix_seconds - newest_unix_seconds) / _DAY_SECONDS
            if age_days <= KEPT_DAYS:
                continue
            shutil.rmtree(folder, ignore_errors=True)
            size_bytes = sum(found.st_size for found in files)
            done.append(
                f"removed {kind}/{folder.name}: another run's, {size_bytes:,} bytes, "
                f"untouched for {age_days:.0f} days ({KEPT_DAYS:.0f} are kept)"
            )
    return done
