"""Captured graphs and the memory that they share."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from played_card.card import Block, Card, Stream


class Pool:
    """Memory of graphs that never run at the same time: as much as they ever held of it at once, until all are gone."""

    def __init__(self, card: Card) -> None:
        self.card, self.held, self.most = card, 0, 0
        self.used: tuple[Stream, int] | None = None  # the last replay in it

    def add(self, size: int) -> None:
        self.held += size
        self.card.hold(max(0, self.held - self.most))
        self.most = max(self.most, self.held)

    def __del__(self) -> None:
        self.card.used -= self.most


@dataclass(frozen=True)
class Kernel:
    """One operator of a graph."""

    work: Callable[[], Any]
    results: tuple[tuple[int, Tensor], ...]  # memory that it was given then: (place among the results, tensor)
    reads: tuple[Memory, ...]
    writes: tuple[Memory, ...]


class Memory:
    """A block that a graph works on. What was there before the graph is not the graph's to keep."""

    def __init__(self, block: Block, graph: Graph) -> None:
        self.block, self.own = weakref.ref(block), block.graph is graph


class Graph:
    """A replay does every kernel anew, in the memory of its capture."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.pool: Pool | None = None
        self.kernels: list[Kernel] = []
        self.before: dict[int, tuple[Any, Any]] = {}  # memory that the capture must leave as it was

    def replay(self) -> None:
        self.card.replays += 1
        for kernel in self.kernels:
            if any(each.block() is None and not each.own for each in kernel.reads + kernel.writes):
                self.card.race("a graph works on memory that was freed after its capture")
            reads, writes = ([each.block() for each in found] for found in (kernel.reads, kernel.writes))
            self.card.in_order([block for block in reads if block], [block for block in writes if block])
            self.card.alone_in(self.pool)
            with _disable_current_modes():
                results = tree_leaves(kernel.work())
                for place, tensor in kernel.results:
                    tensor.copy_(results[place])
