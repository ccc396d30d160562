"""By which code a run is made: fedcil's own files, and a person's modules with what they import from beside them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from hashlib import blake2b
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("fedcil", "client", "server")
INSTALLED = frozenset({"site-packages", "dist-packages"})  # folders of what packages bring


@lru_cache(maxsize=1)
def program(root: Path = ROOT) -> str:
    """Digest of fedcil's own modules as they lay on this machine's disk when it was first asked for."""
    hasher = blake2b(digest_size=8)
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            hasher.update(f"{path.relative_to(root).as_posix()} ".encode() + path.read_bytes())
    return hasher.hexdigest()


def revision(here: Path = Path(__file__)) -> str | None:
    """The checkout's commit, with ``-dirty`` if files differ from it; None where fedcil is installed and not checked
    out, even if that is within somebody's own repository.
    """
    known = _git("ls-files", "--error-unmatch", here.name, folder=here.parent)
    return _git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty", folder=here.parent) if known else None


def _git(*words: str, folder: Path) -> str | None:
    """What git says about a folder, or None if it knows nothing of what was asked."""
    command = ["git", "-C", str(folder), *words]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def sources_of(targets: Iterable[str]) -> dict[str, str]:
    """Digests, by module, of the files of such names as ``package.module:name`` and of what these have imported at once
    from the same place. Names without a module are left out; an installed module is known by its own file.
    """
    found: dict[str, str] = {}
    for name in sorted({target.partition(":")[0] for target in targets if ":" in target}):
        import_module(name)
        _follow(name, found)
    return dict(sorted(found.items()))


def changed_since_loaded(targets: Iterable[str]) -> list[str]:
    """Those of these modules whose files are others by now: a process goes on with what it has loaded."""
    own = sources_of(target for target in targets if target.partition(":")[0] in sys.modules)
    return [name for name, digest in own.items() if (file := _file(name)) and digest != _digest(file)]


def _file(name: str) -> Path | None:
    """Of a loaded module; None for what has none: a notebook, standard input, a namespace."""
    path = Path(getattr(sys.modules.get(name), "__file__", None) or "")
    return path if path.is_file() else None


def _follow(name: str, found: dict[str, str]) -> None:
    """A module, and those that it has loaded from below the folder that its outermost package lies in."""
    file = _file(name)
    if name in found or file is None:
        return
    found[name] = _as_loaded(name, file)
    spec = sys.modules[name].__spec__
    full = spec.name if spec else name  # of what runs as __main__
    is_package = file.name == "__init__.py"
    root = file.parents[full.count(".") + is_package]
    if INSTALLED.intersection(file.parts) or file.suffix != ".py":
        return
    for other in _imported(file, full if is_package else full.rpartition(".")[0]):
        path = root.joinpath(*other.split("."))
        beside = _file(other) in (path.with_suffix(".py"), path / "__init__.py")
        if beside and other.partition(".")[0] not in ROOMS:
            _follow(other, found)


def _imported(file: Path, package: str) -> Iterator[str]:
    """What a file imports as it is loaded, not in a function later: names that may be modules, and their packages."""
    try:
        left: list[ast.AST] = [ast.parse(file.read_bytes())]
    except (SyntaxError, ValueError):  # another version of Python's
        return
    while left:
        node = left.pop()
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                continue
            case ast.Import(names):
                wanted = [each.name for each in names]
            case ast.ImportFrom(module, names, level):
                above = package.split(".")[: package.count(".") + 2 - level] if level else []
                base = ".".join(part for part in (*above, module) if part)
                wanted = [base, *(f"{base}.{each.name}" for each in names)]
            case _:
                wanted = []
        left += ast.iter_child_nodes(node)
        for full in wanted:
            parts = full.split(".")
            yield from (".".join(parts[: end + 1]) for end in range(len(parts)) if all(parts))


def _digest(file: Path) -> str:
    return blake2b(file.read_bytes(), digest_size=8).hexdigest()


def _as_loaded(name: str, file: Path) -> str:
    """Its digest when this was first asked for, kept with the module's spec, of which a reload makes another."""
    spec = sys.modules[name].__spec__
    if spec is None:
        return _digest(file)
    digest: str = vars(spec).setdefault("fedcil_digest", _digest(file))
    return digest
