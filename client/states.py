"""What clients keep between rounds, as content-addressed files in the place where the client lives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedcil.errors import RunFailed
from fedcil.tensor_files import named_path, read_named, write_tensors
from fedcil.tensors import Tensors, content_hash


@dataclass(frozen=True, slots=True)
class StateStore:
    """States by hash. A version is never changed, so a resumed run finds the one that it names."""

    folder: Path

    def save(self, tensors: Tensors) -> str:
        """Write it even if it is there: a resumed run makes the same version again, and mends a damaged one."""
        name = content_hash(tensors)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(named_path(self.folder, name), tensors)
        return name

    def load(self, name: str) -> Tensors:
        """RunFailed if it is not there, or not what its name says."""
        path = named_path(self.folder, name)
        if not path.exists():
            raise RunFailed(f"client state {name} is not there", where=str(path))
        try:
            return read_named(self.folder, name)
        except ValueError:
            raise RunFailed(f"client state {name} is damaged", where=str(path)) from None
