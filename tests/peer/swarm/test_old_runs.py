"""Old runs' states go, everything that may still matter stays."""

import os
from pathlib import Path

from peer.swarm.old_runs import KEPT_DAYS, prune_old_runs

NOW_UNIX_SECONDS = 1_800_000_000.0


def test_only_other_runs_untouched_states_go(tmp_path: Path) -> None:
    def put(name: str, *, age_days: float) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345678")
        at = NOW_UNIX_SECONDS - age_days * 86_400
        os.utime(path, (at, at))
        os.utime(path.parent, (at, at))
        return path

    old, young = KEPT_DAYS + 1, KEPT_DAYS - 1
    gone = [put("state/a-1/1-5.safetensors", age_days=old), put("averaged/a-1/x.bin", age_days=old)]
    kept = [
        put("state/own-1/1-5.safetensors", age_days=old),
        put("state/b-1/1-5.safetensors", age_days=young),
        put("votes/a-1/1.votes", age_days=old),
    ]
    said = prune_old_runs(tmp_path, own_run_folder="own-1", now_unix_seconds=NOW_UNIX_SECONDS)
    assert [path.parent.exists() for path in gone] == [False, False]
    assert all(path.exists() for path in kept)
    assert len(said) == 2 and all("8 bytes" in line and "31 days" in line for line in said)
    assert prune_old_runs(tmp_path, own_run_folder="", now_unix_seconds=NOW_UNIX_SECONDS) != said
    empty = tmp_path / "empty"
    assert prune_old_runs(empty, own_run_folder="", now_unix_seconds=NOW_UNIX_SECONDS) == []
