"""Following a metrics.jsonl that another process writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Tail:
    """Whole lines that come from now on, in order. What a resume has rewritten since is read from the next whole line
    on.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def read(self) -> Iterator[dict[str, Any]]:
        """Those that have come since it was read last."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            at = min(self._offset, file.seek(0, 2))
            file.seek(max(0, at - 1))  # the end of a line, unless a resume has rewritten the file meanwhile
            before, content = file.tell(), file.read()
        first = content.find(b"\n") + 1 if at else 0
        end = content.rfind(b"\n") + 1
        self._offset = before + end if end else at
        for line in content[first:end].splitlines():
            yield json.loads(line)
