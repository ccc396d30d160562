"""Files that are whole or absent: temporary name, sync, rename, sync of the folder."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from fedcil.messages import Tensors


def write_atomic(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` so that a crash at any moment leaves the old file or the new one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensor_bytes(tensors: Tensors) -> bytes:
    """Named tensors as safetensors bytes, in plain C order."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def write_tensors(path: Path, tensors: Tensors) -> None:
    write_atomic(path, tensor_bytes(tensors))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; safetensors.SafetensorError if it is none."""
    return load(path.read_bytes())
