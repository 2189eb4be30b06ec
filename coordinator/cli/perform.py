"""How commands reach the operations: through the running coordinator, or on the store when none
runs.

Changes go to whoever holds the data directory's lock: a running coordinator (Admin.Perform), else
this process takes the lock for the moment. Reads open the store read-only beside anybody.
"""

import time
from pathlib import Path
from typing import Any

from coordinator.api.admin_client import perform_remotely
from coordinator.api.admin_servicer import ADMIN_FUNCTIONS
from coordinator.identity import load_identity, load_running, load_signing_key
from coordinator.operations.common import OperationContext
from coordinator.operations.plain import plain_from_response
from coordinator.operations.writer import Writer
from coordinator.store.sqlite import SqliteStore, has_store
from coordinator.store.sqlite_table import full_disk_is_fatal
from protos.contract.errors import ErrorCode, MachineError, UnavailableError, UsageError


def perform(data_dir: Path, operation: str, request: Any, *, may_create: bool = False) -> Any:
    """Run an operation that changes something, durably; returns its answer as plain data.

    `may_create` lets a data directory come into being. Raises what the operation raises.
    """
    if not may_create:
        require_store(data_dir)
    try:
        store = SqliteStore.open(data_dir)
    except MachineError as error:
        if error.code is not ErrorCode.DATA_DIR_LOCKED:
            raise
        return _perform_where_locked(data_dir, operation, request, error)
    try:
        identity = load_identity(data_dir, hosts=("localhost", "127.0.0.1"))
        context = OperationContext(signing_key=identity.signing_key, data_dir=data_dir)
        writer = Writer(store, context=context, clock=time.time).start()
        try:
            with full_disk_is_fatal():
                response = writer.submit_and_wait(ADMIN_FUNCTIONS[operation], request)
        finally:
            writer.stop()
        return plain_from_response(response)
    finally:
        store.close()


def _perform_where_locked(
    data_dir: Path, operation: str, request: Any, locked: MachineError
) -> Any:
    try:
        load_running(data_dir)
    except UnavailableError:
        raise locked from None
    return perform_remotely(data_dir, operation, request)


def look(data_dir: Path, operation: Any, request: Any) -> Any:
    """Run an operation that only reads; returns its answer as it is."""
    require_store(data_dir)
    store = SqliteStore.open_read_only(data_dir)
    try:
        context = OperationContext(signing_key=load_signing_key(data_dir), data_dir=data_dir)
        return Writer(store, context=context, clock=time.time).read(operation, request)
    finally:
        store.close()


def require_store(data_dir: Path) -> None:
    """Raise UsageError unless a coordinator has worked here."""
    if not has_store(data_dir):
        raise UsageError(
            f"{data_dir.absolute()} is not a coordinator's data directory",
            allowed="the --data-dir that `serve`, `up` or `run create` used",
            remedy="pass --data-dir DIR",
        )
