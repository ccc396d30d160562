"""The import graph: every arrow that the design allows, and no other; no circles."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fedcil", "server", "client", "scenarios")
BOTTOM = (
    "fedcil.errors",
    "fedcil.dotted",
    "fedcil.keys",
    "fedcil.rule",
    "fedcil.section",
    "fedcil.sources",
    "fedcil.threads",
)
VALUES = (
    *BOTTOM,
    "fedcil.tensors",
    "fedcil.fold",
    "fedcil.messages",
    "fedcil.state",
    "fedcil.stream",
    "fedcil.losses",
)
EXPERIMENT = (
    *VALUES,
    "fedcil.allowed",
    "fedcil.capture",
    "fedcil.compute",
    "fedcil.cpu",
    "fedcil.data",
    "fedcil.experiment",
    "fedcil.files",
    "fedcil.tensor_files",
    "fedcil.gather",
    "fedcil.gradients",
    "fedcil.methods",
    "fedcil.models",
    "fedcil.partition",
    "fedcil.partitioners",
    "fedcil.population",
    "fedcil.port",
    "fedcil.robust",
    "fedcil.scenario",
    "fedcil.scenario_file",
    "fedcil.tables",
    "fedcil.timeline",
)

# room -> what it may import of the project (a name allows everything below it) and which libraries
ALLOWED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "fedcil.errors": ((), ()),
    "fedcil.allocator": ((), ()),
    "fedcil.dotted": (("fedcil.errors", "fedcil.sources"), ()),
    "fedcil.sources": ((), ()),
    "fedcil.neighbours": (("fedcil.errors",), ()),
    "fedcil.threads": ((), ()),
    "fedcil.rule": ((), ()),
    "fedcil.section": ((), ("pydantic",)),
    "fedcil.keys": (("fedcil.threads",), ("numpy", "torch")),
    "fedcil.metrics": ((), ("numpy",)),
    "fedcil.losses": ((), ("torch",)),
    "fedcil.tensors": ((), ("torch",)),
    "fedcil.robust": (("fedcil.errors", "fedcil.rule", "fedcil.tensors"), ("numpy", "torch")),
    "fedcil.fold": (("fedcil.errors", "fedcil.robust", "fedcil.rule", "fedcil.tensors"), ("torch",)),
    "fedcil.messages": (("fedcil.fold", "fedcil.rule", "fedcil.tensors"), ("torch",)),
    "fedcil.state": (("fedcil.messages", "fedcil.tensors"), ("torch",)),
    "fedcil.files": ((), ()),
    "fedcil.tensor_files": (("fedcil.files", "fedcil.tensors"), ("torch", "safetensors")),
    "fedcil.gradients": ((), ("torch",)),
    "fedcil.capture": ((), ("torch",)),
    "fedcil.gather": (("fedcil.fold", "fedcil.messages", "fedcil.port", "fedcil.tensors"), ()),
    "fedcil.wire": (
        ("fedcil.errors", "fedcil.messages", "fedcil.robust", "fedcil.rule", "fedcil.tensor_files", "fedcil.tensors"),
        ("torch", "safetensors"),
    ),
    "fedcil.hello": (("fedcil.errors", "fedcil.wire"), ()),
    "fedcil.packets": (("fedcil.errors",), ("flwr", "numpy")),
    "fedcil.port": (("fedcil.errors", "fedcil.messages"), ()),
    "fedcil.stream": ((*BOTTOM, "fedcil.tables"), ("numpy",)),
    "fedcil.partition": (
        (*BOTTOM, "fedcil.files", "fedcil.partitioners", "fedcil.stream", "fedcil.tables"),
        ("numpy",),
    ),
    "fedcil.partitioners": (("fedcil.errors", "fedcil.tables"), ("numpy",)),
    "fedcil.timeline": ((), ()),
    "fedcil.population": ((*BOTTOM, "fedcil.tables", "fedcil.timeline"), ("numpy",)),
    "fedcil.traces": (("fedcil.errors",), ("numpy",)),
    "fedcil.clock": (("fedcil.errors", "fedcil.keys", "fedcil.tables"), ("numpy",)),
    "fedcil.availability": ((*BOTTOM, "fedcil.tables", "fedcil.timeline", "fedcil.traces"), ("numpy",)),
    "fedcil.tables": ((*BOTTOM,), ("pydantic",)),
    "fedcil.method_table": ((*BOTTOM, "fedcil.methods"), ("pydantic_core",)),
    "fedcil.scenario": ((*BOTTOM, "fedcil.method_table", "fedcil.methods", "fedcil.tables"), ("pydantic",)),
    "fedcil.allowed": (("fedcil.scenario",), ()),
    "fedcil.scenario_file": (
        (*BOTTOM, "fedcil.allowed", "fedcil.method_table", "fedcil.scenario"),
        ("pydantic", "tomli_w"),
    ),
    "fedcil.data": (
        (*BOTTOM, "fedcil.data", "fedcil.files", "fedcil.tables"),
        ("torch", "numpy", "PIL", "filelock"),
    ),
    "fedcil.data.download": ((*BOTTOM, "fedcil.data"), ("filelock", "torchvision")),
    "fedcil.data.super_imagenet": ((*BOTTOM, "fedcil.data", "fedcil.files", "fedcil.tables"), ("yaml",)),
    "fedcil.models": (
        ("fedcil.dotted", "fedcil.errors", "fedcil.keys", "fedcil.models", "fedcil.tables", "fedcil.tensors"),
        ("torch",),
    ),
    "fedcil.cpu": ((), ("torch",)),
    "fedcil.compute": (("fedcil.cpu", "fedcil.errors", "fedcil.models", "fedcil.tensors"), ("torch",)),
    "fedcil.methods": (
        (*VALUES, "fedcil.capture", "fedcil.compute", "fedcil.gradients", "fedcil.models", "fedcil.methods"),
        ("torch", "pydantic"),
    ),
    "fedcil.experiment": ((*EXPERIMENT, "fedcil.availability", "fedcil.clock"), ("numpy", "torch")),
    "fedcil.record": (
        (*EXPERIMENT, "fedcil.metrics", "fedcil.record"),
        ("torch", "numpy", "filelock", "jinja2", "rich"),
    ),
    "fedcil.record.drawing": (("fedcil.errors", "fedcil.files"), ("matplotlib", "PIL")),
    "fedcil.record.figures": (
        ("fedcil.metrics", "fedcil.record.drawing", "fedcil.record.run"),
        ("matplotlib", "numpy"),
    ),
    "fedcil.record.comparison_figure": (
        ("fedcil.metrics", "fedcil.record.compare", "fedcil.record.drawing", "fedcil.record.run"),
        ("matplotlib", "numpy"),
    ),
    "server": (
        (*EXPERIMENT, "fedcil.availability", "fedcil.clock", "fedcil.wire", "fedcil.record", "server"),
        ("torch", "numpy"),
    ),
    "server.app": ((*EXPERIMENT, "fedcil.allocator", "fedcil.record", "server"), ("flwr",)),
    "server.grid": (
        (*EXPERIMENT, "fedcil.wire", "fedcil.hello", "fedcil.packets", "server"),
        ("flwr", "torch"),
    ),
    "server.mail": ((), ("flwr",)),
    "server.nodes": ((*EXPERIMENT, "fedcil.hello", "fedcil.packets", "server"), ("flwr",)),
    "server.roster": (("fedcil.errors", "fedcil.hello"), ()),
    "client": ((*EXPERIMENT, "fedcil.wire", "client"), ("torch",)),
    "client.app": (
        (*EXPERIMENT, "fedcil.allocator", "fedcil.wire", "fedcil.hello", "fedcil.packets", "client"),
        ("flwr",),
    ),
    "client.share": ((), ()),
    # Flower's programs are called as programs; a node's own processes load no torch.
    "fedcil.deploy": (("fedcil.errors", "fedcil.files", "fedcil.port", "fedcil.deploy"), ("cryptography", "filelock")),
    "fedcil.deploy.supervisor": (
        ("fedcil.errors", "fedcil.files", "fedcil.port", "fedcil.record", "fedcil.deploy"),
        (),
    ),
    "fedcil.deploy.processes": (("fedcil.dotted", "fedcil.errors", "fedcil.port", "fedcil.deploy"), ()),
    "fedcil.deploy.local": (("fedcil.port", "fedcil.record.run", "fedcil.deploy"), ()),
    "fedcil.engines": (("fedcil", "server", "client"), ("torch", "numpy")),
    "fedcil.engines.workers": (("fedcil.experiment", "fedcil.scenario"), ("joblib", "torch")),
    "fedcil.engines.ray": (("fedcil",), ("ray",)),
    "fedcil.engines.ray_crew": (("fedcil", "client"), ("ray", "torch")),
    "fedcil.engines.ray_cluster": (("fedcil",), ("ray", "psutil")),
    "fedcil.engines.ray_room": (("fedcil.engines", "fedcil.errors"), ("ray",)),
    "fedcil.engines.ray_head": (("fedcil.engines.signals", "fedcil.errors", "fedcil.port"), ("psutil",)),
    "fedcil.engines.flower": (("fedcil", "server", "client"), ("flwr", "psutil")),
    "fedcil.api": (("fedcil", "server"), ()),
    "fedcil.cli": (("fedcil",), ("typer", "rich", "numpy", "joblib")),
    "fedcil.__main__": (("fedcil.cli",), ()),
    "scenarios": (("fedcil.api", "fedcil.record", "fedcil.scenario_file", "fedcil"), ("joblib",)),
    "scenarios.turnover": (("fedcil",), ("matplotlib",)),
    # A benchmark times parts of the machine, so it may reach all of them.
    "scenarios.benchmarks": (
        ("fedcil", "client", "server", "scenarios.benchmarks"),
        ("torch", "torchvision", "numpy", "PIL", "psutil", "matplotlib"),
    ),
    # Steps of the product are held against those of the released program, whose packages are the last two.
    "scenarios.authors": (
        ("fedcil", "client", "scenarios.authors", "scenarios.benchmarks"),
        ("torch", "torchvision", "numpy", "PIL", "joblib", "clients", "models"),
    ),
    # Measured from outside, through what a user has.
    "scenarios.scalability": (("fedcil", "scenarios.scalability"), ("numpy", "matplotlib", "ray")),
    # What is broken on purpose is reached where it is; the port over Flower is driven without a network.
    "scenarios.reliability": (
        ("fedcil", "client", "server", "scenarios.reliability"),
        ("torch", "flwr", "psutil"),
    ),
    "scenarios.benchmarks.peers": (
        ("scenarios.benchmarks", "fedcil.allocator"),
        ("torch", "numpy", "psutil", "flwr", "pfl", "fedlab", "blazefl"),
    ),
    "fedcil": (
        (
            "fedcil.errors",
            "fedcil.neighbours",
            "fedcil.api",
            "fedcil.record.run",
            "fedcil.scenario",
            "fedcil.scenario_file",
        ),
        (),
    ),
}
NEVER = {  # whatever the table says
    "fedcil.models": ("fedcil.methods", "fedcil.engines"),
    "fedcil.methods": ("fedcil.engines", "server", "client", "flwr", "ray"),
    "fedcil.record": ("flwr", "ray", "server", "client"),
    "fedcil.deploy": ("server", "client", "fedcil.engines", "fedcil.cli", "flwr", "ray"),
    "server": ("client", "fedcil.engines", "fedcil.cli", "fedcil.api", "ray"),
    "client": ("server", "fedcil.engines", "fedcil.cli", "fedcil.api", "ray"),
    "scenarios.scalability": ("fedcil.engines", "fedcil.experiment", "fedcil.record", "fedcil.cli", "server", "client"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    return {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Modules that a file names in an import: at its top, late in a function, or for its types alone."""
    found: set[str] = set()
    open_nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}: `from . import` hides what is meant"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
        open_nodes.extend(ast.iter_child_nodes(node))
    return found


MODULES = modules()
STANDARD = set(sys.stdlib_module_names)


def room_of(module: str) -> str:
    """The most special room that the module is in."""
    return max((room for room in ALLOWED if below(module, room)), key=len)


def below(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def is_own(module: str) -> bool:
    return module.split(".", maxsplit=1)[0] in PACKAGES


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_only_what_its_room_allows(module: str) -> None:
    own, libraries = ALLOWED[room_of(module)]
    for imported in imports(MODULES[module]):
        if is_own(imported):
            assert any(below(imported, room) for room in own), f"{module} imports {imported}"
        elif imported.split(".")[0] not in STANDARD:
            assert imported.split(".")[0] in libraries, f"{module} imports {imported}"


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_is_allowed_no_library_that_nobody_in_it_imports(room: str) -> None:
    used = {name.split(".")[0] for module in MODULES if room_of(module) == room for name in imports(MODULES[module])}
    assert set(ALLOWED[room][1]) <= used


@pytest.mark.parametrize("module", sorted(MODULES))
def test_never_imports_what_its_room_must_not_know(module: str) -> None:
    never = [name for room, names in NEVER.items() if below(module, room) for name in names]
    for imported in imports(MODULES[module]):
        assert not any(below(imported, name) for name in never), f"{module} imports {imported}"


@pytest.mark.parametrize(
    ("module", "library"),
    [
        ("fedcil.scenario_file", "torch"),  # a scenario is checked before anything heavy is loaded
        ("fedcil.experiment", "torchvision"),  # only the loader that needs it
        ("fedcil.experiment", "sklearn"),
        ("fedcil.api", "matplotlib"),  # drawn at the end of a run
        ("fedcil.api", "flwr"),
        ("fedcil.api", "ray"),
        ("fedcil.deploy.node", "torch"),  # it lives as long as the run, beside its client apps
        ("fedcil.deploy.pki", "torch"),
    ],
)
def test_a_heavy_library_comes_late(module: str, library: str) -> None:
    code = f"import sys, {module}; sys.exit({library!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {
        module: {name for name in imports(path) if name in MODULES and name != module}
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in done:
            for imported in sorted(graph[module]):
                visit(imported, (*way, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_every_rule_is_about_a_room_that_exists() -> None:
    for room in ALLOWED:
        assert any(below(module, room) for module in MODULES), f"no room {room}"
