"""Where data sets are looked for, and the error that says where they were not."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fedcil.errors import DataMissing

if TYPE_CHECKING:
    from fedcil.scenario import DataSection

ROOT_VARIABLE = "FEDCIL_DATA_ROOT"
SHOWN = 6  # paths that an error lists before it says how many more there are


def default_root(section: DataSection, root: Path | None) -> Path:
    """The data root: option, then ``data.root``, then $FEDCIL_DATA_ROOT, then the user's cache folder."""
    given = root or section.root or os.environ.get(ROOT_VARIABLE) or "~/.cache/fedcil/data"
    return Path(given).expanduser().absolute()


def missing(name: str, looked: Iterable[Path], layout: str, reason: str = "") -> DataMissing:
    """The error for a set that is not there: what was looked at, what it must look like, what to do."""
    paths = [str(path) for path in looked]
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return DataMissing(
        f"the data set {name!r} is not there" + (f": {reason}" if reason else ""),
        where="looked at " + ", ".join(paths[:SHOWN]) + more,
        allowed=f"a data root that holds {layout}",
        next=f"give that folder: --data-root, data.root in the scenario or ${ROOT_VARIABLE} (docs/data.md)",
    )
