"""A user's own code, named in a scenario as ``package.module:name``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from fedcil.errors import FedcilError, ScenarioError, asked_to_end, described
from fedcil.sources import sources_of

WORKING_FOLDER = "FEDCIL_WORKING_FOLDER"
"""Set for programs that are started for a command, elsewhere: the folder that the command was started in."""

MEND = "mend it; docs/extending.md has the contract, with an example"


def search_working_folder() -> None:
    """For own modules, last, as the command itself does."""
    folder = os.environ.get(WORKING_FOLDER)
    if folder and folder not in sys.path:
        sys.path.append(folder)


@contextmanager
def own_code(name: str, where: str, *, allowed: str = "", next: str = MEND) -> Iterator[None]:
    """What a person's own code raises in it, or exits with, is theirs to mend: a ScenarioError that says in which line.
    fedcil's errors are what they are. ``where`` is the key that names it.
    """
    try:
        yield
    except FedcilError:
        raise
    except (Exception, SystemExit) as error:
        if asked_to_end(error):
            raise
        raise ScenarioError(f"{name} raised {described(error)}", where=where, allowed=allowed, next=next) from error


def load_dotted(target: str, where: str) -> Any:
    """The object behind ``package.module:name``. ScenarioError says which half was not found; ``where`` is the key."""
    module, _, name = target.partition(":")
    with own_code(f"{target!r}: module {module!r}", where):
        try:
            found = import_module(module)
        except (ImportError, TypeError, ValueError) as error:
            raise _missing(f"{target!r}: module {module!r} cannot be imported ({error})", where) from None
    if not name or not hasattr(found, name):
        file = getattr(found, "__file__", None) or "built in"
        raise _missing(f"{target!r}: module {module!r} ({file}) has no {name!r}", where)
    sources_of([target])  # as they are now, which a later run in this process may find changed
    return getattr(found, name)


def _missing(what: str, where: str) -> ScenarioError:
    return ScenarioError(
        what,
        where=where,
        allowed="a name that is shipped (`fedcil list`), or package.module:name that can be imported from here",
        next="check the name, and the folder that the command is started in",
    )
