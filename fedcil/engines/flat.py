"""Tensors and replies as single NumPy arrays: what Ray's object store can hand over without a copy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcil.fold import Fold, Interval
from fedcil.messages import Failure, Job, Reply, Report
from fedcil.tensors import Tensors, Total


@dataclass(frozen=True, slots=True)
class Flat:
    """Named tensors as one array of bytes: NumPy arrays are read from the object store where they lie, torch tensors
    would be copied one by one on each side.
    """

    spec: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    content: NDArray[np.uint8]

    def tensors(self) -> dict[str, Tensor]:
        """Views, not to be written to: they may lie in the object store."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch says that the array is read-only
            content = torch.from_numpy(self.content)
        views, start = {}, 0
        for name, shape, dtype in self.spec:
            size = math.prod(shape) * dtype.itemsize
            views[name] = content[start : start + size].view(dtype).view(shape)
            start += size
        return views


def flatten_tensors(tensors: Tensors) -> Flat:
    """Wider types first, so that each tensor is aligned."""
    named = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    spec = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in named)
    parts = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for _, tensor in named]
    return Flat(spec, torch.cat(parts).numpy() if parts else np.empty(0, np.uint8))


Row = tuple[Any, ...]
"""The fields of a small value in their order: a tuple is pickled several times as fast as a dataclass with slots."""

row_of_job: Callable[[Job], Row] = attrgetter(*Job.__slots__)
row_of_report: Callable[[Report], Row] = attrgetter(*Report.__slots__)


def report_of_row(row: Row) -> Report:
    return Report(**dict(zip(Report.__slots__, row, strict=True)))


@dataclass(frozen=True, slots=True)
class FlatReply:
    """A reply whose partial sums are flat: node of the tree -> (sum, weight), or None."""

    leaves: int
    sums: dict[Interval, tuple[Flat, float] | None]
    reports: list[Row]
    failures: tuple[Failure, ...]
    cpu_elsewhere: float

    @classmethod
    def of(cls, reply: Reply, cpu_elsewhere: float = 0.0) -> Self:
        sums: dict[Interval, tuple[Flat, float] | None] = {
            node: (flatten_tensors(total.tensors), total.weight) if total else None
            for node, total in reply.fold.sums.items()
        }
        reports = [row_of_report(report) for report in reply.reports]
        return cls(reply.fold.leaves, sums, reports, reply.failures, cpu_elsewhere)

    def reply(self) -> Reply:
        sums = {node: Total(each[0].tensors(), each[1]) if each else None for node, each in self.sums.items()}
        reports = tuple(map(report_of_row, self.reports))
        return Reply(Fold(self.leaves, sums), reports, self.failures, self.cpu_elsewhere)
