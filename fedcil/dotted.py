"""A user's own code, named in a scenario as ``package.module:name``."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Any

from fedcil.errors import ScenarioError


def load_dotted(target: str, where: str) -> Any:
    """The object behind ``package.module:name``. ScenarioError says which half was not found; ``where`` is the key."""
    module, _, name = target.partition(":")
    try:
        found = import_module(module)
    except (ImportError, TypeError, ValueError) as error:
        raise _missing(f"{target!r}: module {module!r} cannot be imported ({error})", where) from None
    if not name or not hasattr(found, name):
        raise _missing(f"{target!r}: module {module!r} has no {name!r}", where)
    return getattr(found, name)


def sources_of(targets: Iterable[str]) -> dict[str, str]:
    """Digest of the file of each module that such names are of; names without a module are left out."""
    found = {}
    for module in sorted({target.partition(":")[0] for target in targets if ":" in target}):
        file = getattr(import_module(module), "__file__", None)
        if file:
            found[module] = blake2b(Path(file).read_bytes(), digest_size=8).hexdigest()
    return found


def _missing(what: str, where: str) -> ScenarioError:
    return ScenarioError(
        what,
        where=where,
        allowed="a name that is shipped (`fedcil list`), or package.module:name that can be imported from here",
        next="check the name, and the folder that the command is started in",
    )
