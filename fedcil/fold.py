"""The summation tree: partial sums whose bits do not depend on order, grouping or losses.

Addition of floats is not associative, so a sum over clients depends on who came first unless its shape is
fixed. Here the cohort, sorted by client, gives the leaves of a fixed binary tree; a fold holds the sums of
maximal aligned intervals of leaves, and two siblings are always added left + right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from fedcil.errors import RunFailed
from fedcil.robust import combined
from fedcil.rule import PLAIN, Rule
from fedcil.tensors import Contribution, Total

Interval = tuple[int, int]  # (level, index): the leaves [index * 2**level, (index + 1) * 2**level)


@dataclass(slots=True)
class Fold:
    """Sums of disjoint aligned intervals of ``leaves`` leaves; None stands for leaves that gave nothing. A rule that
    has to see every contribution has them all apart, at their leaves.

    The one mutable value of the message layer: it is made, filled and read inside one round.
    """

    leaves: int
    sums: dict[Interval, Total | None]
    own: set[Interval] = field(default_factory=set)  # sums in memory that was made here, and may be written to
    rule: Rule = PLAIN

    @classmethod
    def empty(cls, leaves: int, rule: Rule = PLAIN) -> Self:
        return cls(leaves, {}, rule=rule)

    def add(self, position: int, contribution: Contribution) -> None:
        """Put one client's tensors at its leaf: times its weight, or a copy. ValueError if the leaf was taken."""
        weight, tensors = contribution.weight, contribution.tensors
        if not tensors:
            raise misfit("a client gives no tensors")
        self._refuse_overlap((0, position))
        if self._sums_up:
            kept = dict(zip(tensors, _scaled(list(tensors.values()), weight), strict=True))
        else:  # a worker trains the next client in the same memory
            kept = {name: tensor.clone() for name, tensor in tensors.items()}
        self._put((0, position), Total(kept, weight), own=True)

    def absent(self, position: int) -> None:
        """Say that this leaf will never give anything."""
        self._refuse_overlap((0, position))
        self._put((0, position), None, own=False)

    def merge(self, other: Fold) -> None:
        """Take over what another fold of the same tree holds; it is empty afterwards. ValueError if they overlap, or
        ``other`` in itself: nothing is counted twice.
        """
        if other.leaves != self.leaves:
            raise ValueError(f"folds of different cohorts: {self.leaves} and {other.leaves} leaves")
        for interval in other.sums:
            self._refuse_overlap(interval)
        taken, own = other.sums, other.own
        other.sums, other.own = {}, set()
        for interval, total in taken.items():
            self._refuse_overlap(interval)  # with what came with it
            self._put(interval, total, own=interval in own)

    def total(self) -> Total | None:
        """The sum over all leaves that gave something, or what another rule makes of them; missing leaves count as
        absent. None if none gave, or fewer than the rule needs.
        """
        if not self._sums_up:
            return combined([total.tensors for _, total in sorted(self.sums.items()) if total], self.rule)
        missing = set(range(self.leaves)) - {leaf for interval in self.sums for leaf in _leaves(interval)}
        whole = Fold(next_power_of_two(self.leaves), dict(self.sums))
        for leaf in [*sorted(missing), *range(self.leaves, whole.leaves)]:
            whole._put((0, leaf), None, own=False)
        (result,) = whole.sums.values()
        return result

    @property
    def _sums_up(self) -> bool:
        return self.rule.fold == "mean"

    def _put(self, interval: Interval, total: Total | None, *, own: bool) -> None:
        """At a place that is free."""
        level, index = interval
        while self._sums_up and (sibling := (level, index ^ 1)) in self.sums:
            other, others = self.sums.pop(sibling), sibling in self.own
            self.own.discard(sibling)
            left, right = ((other, others), (total, own)) if index & 1 else ((total, own), (other, others))
            total, own = _add(*left, *right)
            level, index = level + 1, index >> 1
        self.sums[level, index] = total
        if own:
            self.own.add((level, index))

    def _refuse_overlap(self, interval: Interval) -> None:
        (level, index), span = interval, _leaves(interval)
        if span.start < 0 or span.stop > self.leaves or (level and not self._sums_up):
            raise ValueError(f"leaf {index} of level {level} is outside a cohort of {self.leaves}")
        above = ((higher, index >> (higher - level)) for higher in range(level, self.leaves.bit_length() + 1))
        below = (held for held in self.sums if held[0] < level and held[1] >> (level - held[0]) == index)
        if any(held in self.sums for held in above) or (level and any(below)):  # a leaf has nothing below it
            raise ValueError(f"leaves {span.start}..{span.stop - 1} are counted already")


def _scaled(tensors: list[Tensor], weight: float) -> Sequence[Tensor]:
    """Each times ``weight``. torch would make the number a tensor again for each: a third of the time of small ones."""
    plain = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
    return torch._foreach_mul(tensors, torch.tensor(weight, dtype=torch.float32) if plain else weight)


class Misfit(RunFailed):
    """What a round cannot go on with: no client is more wrong than another."""


def misfit(what: str) -> Misfit:
    """The error for contributions of different forms."""
    return Misfit(
        f"contributions that cannot be summed: {what}",
        where="method",
        allowed="the same names and shapes from every client of a round",
        next="mend the method's `fit`",
    )


def _leaves(interval: Interval) -> range:
    level, index = interval
    return range(index << level, (index + 1) << level)


def next_power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def _add(left: Total | None, left_own: bool, right: Total | None, right_own: bool) -> tuple[Total | None, bool]:
    """left + right, and whether its memory may be written to: large sums are added in place where they may be."""
    if left is None or right is None:
        return (left, left_own) if right is None else (right, right_own)
    names = list(left.tensors)
    if left.tensors.keys() != right.tensors.keys():
        raise misfit(
            f"clients give tensors of different names: {sorted(left.tensors.keys() ^ right.tensors.keys())[:5]}"
        )
    one, two = [left.tensors[n] for n in names], [right.tensors[n] for n in names]
    if any(a.shape != b.shape for a, b in zip(one, two, strict=True)):
        differing = [name for name in names if left.tensors[name].shape != right.tensors[name].shape]
        raise misfit(f"clients give tensors of different shapes: {differing[:5]}")
    weight = left.weight + right.weight
    if left_own:
        torch._foreach_add_(one, two)
        return Total(left.tensors, weight), True
    return Total(dict(zip(names, torch._foreach_add(one, two), strict=True)), weight), True
