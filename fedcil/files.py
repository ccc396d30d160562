"""Files that are whole or absent: temporary name, sync, rename, sync of the folder."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import load, save
from torch import Tensor

from fedcil.messages import Tensors


def write_atomic(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` so that a crash at any moment leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            sync_file(file)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_file(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensor_bytes(tensors: Tensors) -> bytes:
    """Named tensors as safetensors bytes, in plain C order. Copies: the format refuses tensors that share memory."""
    plain = torch.contiguous_format
    return save({name: tensor.detach().cpu().clone(memory_format=plain) for name, tensor in tensors.items()})


def write_tensors(path: Path, tensors: Tensors) -> None:
    write_atomic(path, tensor_bytes(tensors))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError if it is none, whatever is wrong with it."""
    content = path.read_bytes()
    try:
        return load(content)
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"{path.name} holds no tensors: {error}") from None
