"""Runs rounds of averaging peers (averaging_peer.py) side by side, Muster's and hivemind's, for
ops/bench/allreduce and ops/bench/wan/share.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared import ROOT, say

PEER_SCRIPT = Path(__file__).resolve().parent / "averaging_peer.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is averaged, by whom, over what."""

    num_peers: int
    num_values: int
    codec: str = "fp32"
    timeout_seconds: float = 120.0
    matchmaking_seconds: float = 3.0
    """hivemind only."""
    hosts: tuple[str, ...] = ()
    """Address of each peer; loopback if empty."""
    is_one_connection: bool = False
    """Muster only: no lanes."""
    upload_limit_mbit: float = 0.0
    """Muster only: what the owner allows; 0 for no limit."""
    prefixes: tuple[tuple[str, ...], ...] = ()
    """Command before each peer's own, such as `ip netns exec NAME`."""


@dataclass(slots=True)
class Rounds:
    """Answers of all peers, round by round; the first round, which warms up, is left out."""

    answers: list[list[dict[str, Any]]] = field(default_factory=list)
    """Why each peer's ways to the others are what they are, after the last round."""

    def worst(self, name: str) -> list[float]:
        """Largest of the peers, of each round in which all succeeded."""
        return [max(a[name] for a in answer) for answer in self.good()]

    def mean(self, name: str) -> list[float]:
        """Mean over the peers, of each round in which all succeeded."""
        return [sum(a[name] for a in answer) / len(answer) for answer in self.good()]

    def good(self) -> list[list[dict[str, Any]]]:
        """Rounds in which everybody got the whole group's average."""
        return [
            answer
            for answer in self.answers
            if not any("error" in a for a in answer)
            and all(a.get("num_peers", len(answer)) == len(answer) for a in answer)
        ]

    def problems(self) -> list[str]:
        """What went wrong in the others."""
        return [
            str([a.get("error") or a.get("num_peers", "fine") for a in answer])
            for answer in self.answers
            if answer not in self.good()
        ]


class Peer:
    """A peer's process."""

    def __init__(self, kind: str, name: str, setting: Setting, index: int) -> None:
        config = {
            "host": setting.hosts[index] if setting.hosts else "127.0.0.1",
            "num_peers": setting.num_peers,
            "num_values": setting.num_values,
            "codec": setting.codec,
            "is_one_connection": setting.is_one_connection,
            "upload_limit_mbit": setting.upload_limit_mbit,
            "timeout_seconds": setting.timeout_seconds,
            "matchmaking_seconds": setting.matchmaking_seconds,
        }
        prefix = setting.prefixes[index] if setting.prefixes else ()
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(PEER_SCRIPT), kind, name, json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )

    def tell(self, **fields: Any) -> None:
        """Send an order."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(fields) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Read the next answer; what is no JSON object is somebody's chatter."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        self.errors.seek(0)
        last = self.errors.read()[-2000:]
        raise RuntimeError(f"{self.name} ended with status {self.process.wait()}: {last}")

    def end(self) -> None:
        """Let it close in good order."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()


def _all_hear(peers: Iterable[Peer]) -> list[dict[str, Any]]:
    return [peer.hear() for peer in peers]


def _all_tell(peers: Iterable[Peer], **fields: Any) -> None:
    for peer in peers:
        peer.tell(**fields)


def equal_ends(num_pieces: int, num_peers: int) -> list[int]:
    """Equal slices."""
    return [num_pieces * (rank + 1) // num_peers for rank in range(num_peers)]


def run_muster(setting: Setting, num_rounds: int, ends: Sequence[int] | None = None) -> Rounds:
    """Rounds of Muster's all-reduce; the parent stands in for the forming of the group."""
    names = [f"peer{i}" for i in range(setting.num_peers)]
    peers = [Peer("muster", name, setting, i) for i, name in enumerate(names)]
    num_pieces = -(-setting.num_values // 65_536)
    slices = list(ends or equal_ends(num_pieces, len(peers)))
    rounds = Rounds()
    try:
        met = dict(zip(names, _all_hear(peers), strict=True))
        _all_tell(peers, members=met)
        for number in range(num_rounds + 1):
            _all_tell(peers, round=number + 1)
            committed = _all_hear(peers)
            digests = {n: c["digests"] for n, c in zip(names, committed, strict=True)}
            _all_tell(peers, digests=digests, ends=slices)
            _all_hear(peers)
            _all_tell(peers, order="go")
            _all_hear(peers)
            _all_tell(peers, order="report")
            answers = _all_hear(peers)
            for answer, commit in zip(answers, committed, strict=True):
                answer["commit_cpu_seconds"] = commit["commit_cpu_seconds"]
            walls, lanes = ([a[k] for a in answers] for k in ("wall_seconds", "num_lanes"))
            say(f"muster round {number}: {[round(wall, 2) for wall in walls]}, lanes {lanes}")
            if number > 0:
                rounds.answers.append(answers)
                held = {a["digest"] for a in answers if "digest" in a}
                assert len(held) <= 1, "members hold different bytes"
    finally:
        for peer in peers:
            peer.end()
    return rounds


def run_hivemind(setting: Setting, num_rounds: int) -> Rounds:
    """Rounds of hivemind's DecentralizedAverager."""
    peers: list[Peer] = []
    rounds = Rounds()
    initial: list[str] = []
    try:
        for i in range(setting.num_peers):
            peer = Peer("hivemind", f"peer{i}", setting, i)
            peers.append(peer)
            peer.tell(initial_peers=initial)
            addresses = peer.hear()["addresses"]
            initial = initial or addresses
        for number in range(num_rounds + 1):
            for peer in peers:
                peer.tell(round=number + 1)
            answers = _all_hear(peers)
            say(f"hivemind round {number}: {[round(a['wall_seconds'], 2) for a in answers]}")
            if number > 0:
                rounds.answers.append(answers)
    finally:
        for peer in peers:
            peer.end()
    return rounds
