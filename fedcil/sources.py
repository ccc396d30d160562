"""By which code a run is made: fedcil's own files, and a person's modules with what they import from beside them."""

from __future__ import annotations

import ast
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import lru_cache
from hashlib import blake2b
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("fedcil", "client", "server")


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
    """Digests, by module, of the files of such names as ``package.module:name`` and of all that these import from the
    same place, as they were loaded. Names without a module are left out.
    """
    found: dict[str, str] = {}
    for name in sorted({target.partition(":")[0] for target in targets if ":" in target}):
        file = _file(name)
        if file:
            _follow(name, file, file.parents[name.count(".") + (file.name == "__init__.py")], found)
    return dict(sorted(found.items()))


def changed_since_loaded(targets: Iterable[str]) -> list[str]:
    """Those of these modules whose files are others by now: a process goes on with what it has loaded."""
    own = sources_of(target for target in targets if target.partition(":")[0] in sys.modules)
    return [name for name, digest in own.items() if (file := _file(name)) and digest != _digest(file)]


def _file(name: str) -> Path | None:
    """None for what has none: a notebook, standard input."""
    path = Path(getattr(import_module(name), "__file__", None) or "")
    return path if path.is_file() else None


def _follow(name: str, file: Path, root: Path, found: dict[str, str]) -> None:
    """A module below ``root``, and what it imports from there. Of installed ones only its own package."""
    if name in found:
        return
    found[name] = _as_loaded(name, file)
    if file.suffix != ".py":
        return
    installed = root in {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib", "stdlib")}
    for other in _imported(name, file):
        top = other.partition(".")[0]
        if top in ROOMS or (installed and top != name.partition(".")[0]):
            continue
        stem = root.joinpath(*other.split("."))
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                _follow(other, path, root, found)


def _imported(name: str, file: Path) -> Iterator[str]:
    """Names that may be modules, with the packages that they lie in."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_bytes())):
        match node:
            case ast.Import(names):
                wanted = [each.name for each in names]
            case ast.ImportFrom(module, names, level):
                above = package.split(".")[: package.count(".") + 2 - level] if level else []
                base = ".".join([*above, *([module] if module else [])])
                wanted = [base, *(f"{base}.{each.name}" for each in names)]
            case _:
                continue
        for full in wanted:
            parts = full.split(".")
            yield from (".".join(parts[: end + 1]) for end in range(len(parts)))


def _digest(file: Path) -> str:
    return blake2b(file.read_bytes(), digest_size=8).hexdigest()


def _as_loaded(name: str, file: Path) -> str:
    """Its digest when this was first asked for, kept with the module's spec, of which a reload makes another."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    if spec is None:
        return _digest(file)
    digest: str = vars(spec).setdefault("fedcil_digest", _digest(file))
    return digest
