"""What clients keep, by a method's ``client_memory``: what its two functions give is checked here."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from client.problems import ClientProblem
from fedcil.methods.base import Samples
from fedcil.stream import Task
from fedcil.tensors import Tensors


def joined(given: object, own: Samples, task: Task) -> Samples:
    """What ``join`` gave. ClientProblem if these are no samples: stored images of one size, a label for each."""
    if not isinstance(given, Samples):
        raise _wrong("join", f"a {type(given).__name__}, not a fedcil.methods.base.Samples")
    images, labels, like = given.images, given.labels, own.images
    if images.dtype != torch.uint8 or images.shape[1:] != like.shape[1:]:
        raise _wrong("join", f"images {_shown(images)}; stored ones are uint8 of shape (n, {_sizes(like.shape[1:])})")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise _wrong("join", f"labels {_shown(labels)} for {len(images)} images; needed is int64, one for each")
    if len(labels) and not (labels.min() >= 0 and labels.max() < task.seen):
        raise _wrong("join", f"labels outside 0 to {task.seen - 1}, the classes seen")
    return given


def updated(given: object) -> Tensors:
    """What ``update`` gave. ClientProblem if these are no named tensors."""
    if not isinstance(given, Mapping):
        raise _wrong("update", f"a {type(given).__name__}, not tensors by their names")
    for name, tensor in given.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            raise _wrong("update", f"{name!r:.100} -> {type(tensor).__name__}, not a tensor by its name")
    return given


def _wrong(function: str, what: str) -> ClientProblem:
    return ClientProblem(f"the method's client_memory.{function} gave {what}", where="memory")


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape ({_sizes(tensor.shape)})"


def _sizes(shape: torch.Size) -> str:
    return ", ".join(map(str, shape)) + "," * (len(shape) == 1)
