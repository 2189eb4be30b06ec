"""Who may import whom, checked over every import of the tree, those inside functions included.

The tables below are the architecture's. A module that no group names fails too: a new file is a
decision about its layer.
"""

import ast
import sys

import pytest

from tests.source_tree import (
    PRODUCT_PACKAGES,
    SourceFile,
    dotted_name,
    imports_at_load,
    imports_of,
    is_within,
    load_source_files,
)

# Lowest first. A unit may import units of lower groups and itself, nothing beside or above it.
LAYERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "protos": (("muster",), ("contract",)),
    "peer": (
        ("background", "ipc", "parent_death", "shared_vectors", "home", "identity", "config")
        + ("metrics",),
        ("model",),
        ("coordinator_client", "session", "parallel"),
        ("checkpoint", "data"),
        ("swarm", "eval"),
        ("train",),
        ("supervisor",),
        ("daemon",),
        ("cli",),
    ),
    "coordinator": (
        ("ports",),
        ("config", "metrics", "identity", "rendezvous", "repeating"),
        ("domain", "scaling", "store"),
        ("corpus", "study"),
        ("operations",),
        ("api", "web", "ticker", "refit", "dial_back", "mirror_index"),
        ("app",),
        ("cli",),
    ),
}

# Files that belong to a unit without saying so in their name.
PARTS = {"peer.lease_holdings": "session"}

# Library -> files or folders that may import it. Everything else may not.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "hivemind": ("peer/swarm/",),
    "torch.distributed": ("peer/parallel/", "peer/train/", "peer/checkpoint/", "peer/eval/"),
    "torch": ("peer/",),
    "sqlite3": ("coordinator/store/",),
    "psycopg": ("coordinator/store/",),
    "prometheus_client": ("peer/metrics.py", "coordinator/metrics.py"),
    "rich": ("peer/cli/", "coordinator/cli/"),
    "typer": ("peer/cli/", "coordinator/cli/"),
    "cryptography": (
        "protos/contract/signing.py",
        "protos/contract/channel.py",
        "peer/",
        "coordinator/",
    ),
    "peer": ("peer/",),
    "coordinator": ("coordinator/",),
}

# What the contract may use at all, beside the standard library.
CONTRACT_LIBRARIES = {"protos", "google", "numpy", "grpc", "cryptography"}
CONTRACT_NEVER = {"sqlite3", "asyncio", "subprocess", "threading", "logging"}

STUB_FOLDERS = ("peer/coordinator_client.py", "coordinator/api/")
ENVIRONMENT_FILES = ("peer/config.py", "coordinator/config.py")
PRINT_FOLDERS = ("peer/cli/", "coordinator/cli/")

PURE_ROOTS = (
    "coordinator/domain/",
    "coordinator/scaling/",
    "peer/session.py",
    "peer/swarm/round_state.py",
)
SEEDED_ROOTS = ("coordinator/scaling/",)
"""May draw random numbers, from a seed that is an argument."""
IMPURE_MODULES = (
    "asyncio",
    "concurrent.futures",
    "grpc",
    "hivemind",
    "logging",
    "multiprocessing",
    "os",
    "pathlib",
    "random",
    "secrets",
    "select",
    "signal",
    "socket",
    "sqlite3",
    "ssl",
    "subprocess",
    "tempfile",
    "threading",
    "time",
    "torch",
    "uuid",
    "protos.contract.channel",
)

# What must not be loaded by importing a process's entry point, directly or through others.
NOT_LOADED_BY = {
    "coordinator.cli.main": ("torch", "hivemind", "scipy", "grpc"),
    "coordinator.app": ("torch", "hivemind", "scipy"),
    "peer.cli.main": ("torch", "hivemind", "grpc", "numpy"),
    "peer.daemon": ("torch", "hivemind"),
    "peer.swarm.__main__": ("grpc", "peer.train"),
    "peer.train.__main__": ("grpc", "hivemind"),
}


def unit_of(module: str) -> tuple[str, str]:
    """(package, unit) of a repository module: ("peer", "model") for peer.model.init, and for a part
    such as peer.session_link the unit that it was split from, ("peer", "session")."""
    package, name = (module.split(".") + [""])[:2]
    name = PARTS.get(f"{package}.{name}", name)
    wholes = [unit for group in LAYERS.get(package, ()) for unit in group]
    whole = next((unit for unit in wholes if name.startswith(unit + "_")), name)
    return package, name if name in wholes else whole


def group_of(package: str, unit: str) -> int | None:
    """Index of the unit's group, None if no group names it."""
    for index, group in enumerate(LAYERS[package]):
        if unit in group:
            return index
    return None


def product_files() -> tuple[SourceFile, ...]:
    """Hand-written files of the product."""
    return load_source_files(*PRODUCT_PACKAGES)


def complain(problems: list[str]) -> None:
    """Fail with all problems, one per line."""
    assert not problems, "\n" + "\n".join(sorted(problems))


def test_every_unit_has_a_layer() -> None:
    units = {unit_of(file.module) for file in product_files()}
    complain(
        [
            f"{package}/{unit} is in no layer; add it to LAYERS where its imports allow"
            for package, unit in units
            if unit and group_of(package, unit) is None
        ]
    )


def test_imports_go_downwards() -> None:
    problems = []
    for file in product_files():
        package, unit = unit_of(file.module)
        own_group = group_of(package, unit)
        for imported in imports_of(file):
            other_package, other_unit = unit_of(imported.module)
            if other_package != package or not other_unit or other_unit == unit:
                continue
            other_group = group_of(other_package, other_unit)
            if own_group is None or other_group is None or other_group < own_group:
                continue
            direction = "sideways" if other_group == own_group else "upwards"
            problems.append(f"{file.at(imported.line)} imports {imported.module} {direction}")
    complain(problems)


def test_libraries_stay_where_they_belong() -> None:
    problems = []
    for file in product_files():
        for imported in imports_of(file):
            for library, places in ONLY_IN.items():
                if is_within(imported.module, library) and not file.path.startswith(places):
                    allowed = ", ".join(places)
                    problems.append(
                        f"{file.at(imported.line)} imports {imported.module}; only {allowed} may"
                    )
    complain(problems)


def test_imports_can_be_read() -> None:
    complain(
        [
            f"{file.at(imported.line)} imports a computed name; name it"
            for file in product_files()
            for imported in imports_of(file)
            if imported.module == "<computed>"
        ]
    )


def test_contract_uses_little() -> None:
    problems = []
    for file in load_source_files("protos"):
        for imported in imports_of(file):
            top = imported.module.split(".")[0]
            is_library = top not in sys.stdlib_module_names
            if (is_library and top not in CONTRACT_LIBRARIES) or top in CONTRACT_NEVER:
                problems.append(f"{file.at(imported.line)} imports {imported.module}")
            if top == "grpc" and file.path != "protos/contract/channel.py":
                problems.append(f"{file.at(imported.line)} imports grpc; only channel.py may")
    complain(problems)


def test_stubs_have_two_homes() -> None:
    complain(
        [
            f"{file.at(imported.line)} imports {imported.module}; only {STUB_FOLDERS} may"
            for file in product_files()
            for imported in imports_of(file)
            if imported.module.endswith("_pb2_grpc") and not file.path.startswith(STUB_FOLDERS)
        ]
    )


def test_environment_is_read_in_the_configs_only() -> None:
    """Whoever starts a child passes on what config.py returns."""
    names = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv"}
    problems = []
    for file in product_files():
        if file.path in ENVIRONMENT_FILES:
            continue
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Attribute) and dotted_name(node) in names:
                problems.append(f"{file.at(node.lineno)} uses {dotted_name(node)}")
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                found = {f"os.{alias.name}" for alias in node.names} & names
                problems += [f"{file.at(node.lineno)} imports {name}" for name in found]
    complain(problems)


def test_only_command_lines_print() -> None:
    complain(
        [
            f"{file.at(node.lineno)} prints; use logging"
            for file in product_files()
            if not file.path.startswith(PRINT_FOLDERS)
            for node in ast.walk(file.tree)
            if isinstance(node, ast.Call) and dotted_name(node.func) == "print"
        ]
    )


@pytest.mark.parametrize("entry", sorted(NOT_LOADED_BY))
def test_processes_load_only_what_they_need(entry: str) -> None:
    """hivemind forks before gRPC and CUDA exist, --help is quick, a coordinator installs without
    torch.
    """
    file_by_module = {file.module: file for file in product_files()}
    does_exist = entry in file_by_module
    assert does_exist, f"{entry} does not exist"
    chain_by_module = {entry: entry}
    waiting, problems = [entry], []
    while waiting:
        module = waiting.pop()
        for imported in imports_at_load(file_by_module[module]):
            chain = f"{chain_by_module[module]} -> {imported.module}"
            if any(is_within(imported.module, name) for name in NOT_LOADED_BY[entry]):
                problems.append(chain)
            parts = imported.module.split(".")
            for length in range(1, len(parts) + 1):
                parent = ".".join(parts[:length])
                if parent in file_by_module and parent not in chain_by_module:
                    chain_by_module[parent] = chain
                    waiting.append(parent)
    complain(problems)


def test_decisions_are_pure() -> None:
    """Decision modules, and every module of ours that they import, have no clock, RNG, thread, I/O
    or log.
    """
    file_by_module = {file.module: file for file in product_files()}
    waiting = [file for file in product_files() if file.path.startswith(PURE_ROOTS)]
    seen = {file.module for file in waiting}
    problems = []
    while waiting:
        file = waiting.pop()
        for imported in imports_of(file):
            impure = [name for name in IMPURE_MODULES if is_within(imported.module, name)]
            if impure:
                problems.append(f"{file.at(imported.line)} imports {imported.module}, yet is pure")
            is_ours = imported.module.startswith(("peer.", "coordinator."))
            if is_ours and imported.module not in seen and imported.module in file_by_module:
                seen.add(imported.module)
                waiting.append(file_by_module[imported.module])
        for node in ast.walk(file.tree):
            name = dotted_name(node)
            is_seeded = file.path.startswith(SEEDED_ROOTS)
            is_random = name in ("np.random", "numpy.random") and not is_seeded
            if is_random or name.endswith((".now", ".utcnow")):
                problems.append(f"{file.at(getattr(node, 'lineno', 0))} uses {name}, yet is pure")
            if isinstance(node, ast.Call) and dotted_name(node.func) == "open":
                problems.append(f"{file.at(node.lineno)} opens a file, yet is pure")
    complain(problems)
