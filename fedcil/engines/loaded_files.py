"""Whether a process that starts now would load what this one has loaded."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path


class LoadedFiles:
    """The files of the modules that are loaded now: a process that starts later may find others."""

    def __init__(self) -> None:
        files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
        self._changed_at = {file: _changed_at(file) for file in files if file}

    def changed(self) -> str:
        """One whose file has changed since, or nothing."""
        return next((file for file, when in self._changed_at.items() if _changed_at(file) != when), "")


def _changed_at(file: str) -> int | None:
    """Nanoseconds; None if there is no such file."""
    with contextlib.suppress(OSError):
        return Path(file).stat().st_mtime_ns
    return None
