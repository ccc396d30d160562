"""Named tensors as safetensors bytes and files. Nothing is ever unpickled."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from fedcil.files import write_atomic
from fedcil.tensors import Tensors, content_hash


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


def named_path(folder: Path, name: str) -> Path:
    """Where tensors with this content hash are kept."""
    return folder / f"{name}.safetensors"


def read_named(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors with this content hash; ValueError if the file holds others, or none."""
    path = named_path(folder, name)
    tensors = read_tensors(path)
    if content_hash(tensors) != name:
        raise ValueError(f"{path.name} is damaged")
    return tensors
