"""Which members can be dialled, as the coordinator itself found out (dial_back/): what is to be
dialled, and what came of it.

A member that cannot be dialled sends and receives over connections that it makes itself, and
reduces nothing; the roster says so, so that all members count alike. Where nobody can be dialled
from here everybody reduces all the same: they may reach one another, as behind one router.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from coordinator.domain.run_state import FINAL_STATES
from coordinator.operations.common import OperationContext, unix_ms
from coordinator.operations.members import (
    capabilities_from_json,
    capabilities_to_json,
    member_from_row,
)
from coordinator.store.base import Transaction
from coordinator.store.rows_membership import PeerRow

EVENT_KIND = "reach"


@dataclass(frozen=True, slots=True, kw_only=True)
class FindDialsRequest:
    """All runs that are not over."""


@dataclass(frozen=True, slots=True)
class DialTask:
    """A live member and where it says that it listens."""

    run_id: str
    peer_id: str
    p2p_peer_id: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReachRequest:
    """What came of a task; `problem` is "" if the member answered."""

    task: DialTask
    problem: str


def find_dials(
    tx: Transaction,
    request: FindDialsRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> tuple[DialTask, ...]:
    """Live members that have said where they listen. Only reads."""
    tasks = []
    for run in tx.runs():
        if run.state in FINAL_STATES:
            continue
        for row in tx.peers(run.run_id):
            addresses = capabilities_from_json(row.capabilities_json).addresses
            if addresses and member_from_row(row).is_live:
                tasks.append(DialTask(run.run_id, row.peer_id, row.p2p_peer_id, addresses))
    return tuple(tasks)


def save_reach(
    tx: Transaction,
    request: SaveReachRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> str:
    """Store whether a member can be dialled; the next directive says so to all. Returns what
    changed, "" if nothing did.
    """
    task, problem = request.task, request.problem
    row = tx.peer(task.run_id, task.peer_id)
    if row is None:
        return ""
    before = capabilities_from_json(row.capabilities_json)
    if before.addresses != task.addresses or before.reach_problem == problem:
        return ""  # it has moved meanwhile, or nothing is new
    after = replace(before, reach_problem=problem)
    tx.put_peer(replace(row, capabilities_json=capabilities_to_json(after)))
    if bool(before.reach_problem) == bool(problem):
        return ""
    can = "can be dialled now" if not problem else f"cannot be dialled ({problem})"
    so = "it reduces like others" if not problem else "it sends and receives, but reduces nothing"
    said = [f"{row.name} {can}: {so}"]
    if warning := reach_warning(tx.peers(task.run_id)):
        said.append(warning)
    for text in said:
        tx.insert_event(
            run_id=task.run_id,
            unix_ms=unix_ms(now_unix_seconds),
            kind=EVENT_KIND,
            peer_id=task.peer_id,
            text=text,
        )
    return "; ".join(said)


def reach_warning(rows: Iterable[PeerRow]) -> str:
    """What is wrong when of several live members none can be dialled; "" otherwise."""
    live = [row for row in rows if member_from_row(row).is_live]
    problems = {
        row.name: capabilities_from_json(row.capabilities_json).reach_problem for row in live
    }
    if len(live) < 2 or not all(problems.values()):
        return ""
    name, problem = min(problems.items())
    return (
        f"none of the {len(live)} live peers can be dialled from here (such as {name}: {problem}), "
        "so rounds work only where peers reach one another; at least one peer should accept "
        "connections: let its --listen-port through the firewall or router, or tell the address "
        "that leads to it with --announce"
    )
