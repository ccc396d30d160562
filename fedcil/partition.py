"""How one task's samples are shared among the clients.

A rule is a pure function ``rule(labels, clients, section, rng)``: ``labels`` (n,) are the stream labels of
one task's samples, and it gives one array of positions in ``labels`` for each client. ``partition.name`` is a
name in the table at the end of this file, or your own rule as ``package.module:function``. Whatever the rule,
its answer is checked: every sample goes to exactly one client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fedcil.dotted import load_dotted
from fedcil.errors import InputError, ScenarioError, described

if TYPE_CHECKING:
    from fedcil.keys import Key
    from fedcil.stream import Stream, Task
    from fedcil.tables import PartitionSection

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Rng = np.random.Generator
Rule = Callable[[Ints, int, "PartitionSection", Rng], Sequence[Ints]]

TRIES = 1000  # draws of the dirichlet rule before it gives up,
HOPELESS_TRIES, HOPELESS_CLIENTS = 10, 100  # or after so few, if each left more clients than this with too little
EPS = 1e-5  # what the MFCL authors add to every class that still has samples


@dataclass(frozen=True, slots=True)
class TaskPartition:
    """One task's samples, client after client: ``indices`` (samples,) point into the training set.

    Client c owns ``indices[offsets[c]:offsets[c + 1]]``; ``offsets`` is (clients + 1,).
    """

    indices: NDArray[np.int32]
    offsets: Ints

    def of(self, client: int) -> NDArray[np.int32]:
        """The training samples of one client, (its samples,)."""
        return self.indices[self.offsets[client] : self.offsets[client + 1]]

    def counts(self) -> Ints:
        """Samples of each client, (clients,)."""
        return np.diff(self.offsets)


def make_partition(
    section: PartitionSection,
    clients: int,
    stream: Stream,
    labels: Ints,
    key: Key,
    sharing: Callable[[int], Ints] | None = None,
) -> tuple[TaskPartition, ...]:
    """Share the samples of every task; each task draws afresh, from ``key.at("partition", task.index)``.

    ``labels`` (n,) are the stream labels of all training samples; -1 is not in the stream. ``sharing(task)`` gives
    the sorted ids of those who share it, all clients by default; the others get nothing. Raises ScenarioError if the
    rule cannot serve that many clients, or leaves one without samples that may not be.
    """
    owners = sharing or (lambda _: np.arange(clients))
    return tuple(
        _share_task(section, clients, owners(task.index), task, labels, key.at("partition", task.index))
        for task in stream.tasks
    )


def save_partition(path: str | Path, parts: Sequence[TaskPartition]) -> None:
    """Write ``task<i>_indices`` and ``task<i>_offsets`` of each task to an npz file, without pickle."""
    arrays: dict[str, Any] = {}
    for task, part in enumerate(parts):
        arrays |= {f"task{task}_indices": part.indices, f"task{task}_offsets": part.offsets}
    with Path(path).open("wb") as file:  # an open file keeps numpy from changing the name
        np.savez(file, allow_pickle=False, **arrays)


def load_partition(path: str | Path) -> tuple[TaskPartition, ...]:
    """Read what save_partition wrote. Raises InputError if the file is missing or broken."""
    try:
        with Path(path).open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            return tuple(_load_task(arrays, task) for task in range((len(arrays.files) + 1) // 2))
    except (OSError, EOFError, ValueError, KeyError, AttributeError, BadZipFile) as error:
        raise InputError(
            f"not a partition: {error}",
            where=str(path),
            allowed="an npz file with task<i>_indices and task<i>_offsets of every task",
            next="take the partition.npz of a run folder, or make the run again",
        ) from None


def _load_task(arrays: Any, task: int) -> TaskPartition:
    part = TaskPartition(arrays[f"task{task}_indices"], arrays[f"task{task}_offsets"])
    if part.offsets[0] != 0 or part.offsets[-1] != len(part.indices) or part.counts().min(initial=0) < 0:
        raise ValueError(f"the offsets of task {task} do not fit its {len(part.indices)} indices")
    return part


def _share_task(
    section: PartitionSection, clients: int, owners: Ints, task: Task, labels: Ints, key: Key
) -> TaskPartition:
    members = np.flatnonzero((labels >= task.old) & (labels < task.seen))
    rule, sharing = _load_rule(section.name), len(owners)
    counts = np.zeros(clients, dtype=np.int64)
    try:
        _refuse_too_few_samples(len(members), sharing, section)
        shares = _checked(_call(rule, labels[members], sharing, section, key.numpy()), len(members), sharing)
        counts[owners] = [len(share) for share in shares]
        _refuse_empty_client(counts, owners, section)
    except ScenarioError as error:  # the rules do not know which task they share
        raise ScenarioError(
            f"task {task.index + 1}: {error.what}", where=error.where, allowed=error.allowed, next=error.next
        ) from None
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
    return TaskPartition(members[np.concatenate(shares)].astype(np.int32), offsets)


def _call(rule: Rule, labels: Ints, clients: int, section: PartitionSection, rng: Rng) -> Sequence[Ints]:
    """An error inside a person's own rule is theirs to mend, and says where."""
    try:
        return rule(labels, clients, section, rng)
    except ScenarioError:
        raise
    except Exception as error:
        if section.name in RULES:
            raise
        raise ScenarioError(
            f"{section.name} raised {described(error)}",
            where="partition.name",
            next="mend it; docs/extending.md has the contract",
        ) from error


def _load_rule(name: str) -> Rule:
    if name in RULES:
        return RULES[name]
    rule: Rule = load_dotted(name, "partition.name")
    return rule


def _refuse_too_few_samples(samples: int, clients: int, section: PartitionSection) -> None:
    if samples == 0:
        raise ScenarioError(
            "no training sample has a class of this task",
            where="data, stream",
            allowed="at least one sample of each task",
            next="check data.classes, data.samples_per_class and stream.class_order",
        )
    if clients == 0:
        raise ScenarioError(
            "nobody gets samples of this task",
            where="population",
            allowed="newcomers, or old members that move on, at each task border",
            next="raise population.newcomers, population.size or population.move_on",
        )
    if samples < clients and not section.allow_empty:
        raise ScenarioError(
            f"{clients} clients cannot share {samples} samples",
            where="clients.count",
            allowed=f"1 to {samples} clients, or partition.allow_empty = true",
            next="lower clients.count, or use more samples of each class or more classes in each task",
        )


def _refuse_empty_client(counts: Ints, owners: Ints, section: PartitionSection) -> None:
    empty = owners[counts[owners] == 0]
    if section.allow_empty or not len(empty):
        return
    others = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
    raise ScenarioError(
        f"client {empty[0]}{others} of {len(owners)} would be without samples",
        where="partition",
        allowed="at least one sample for each client, or partition.allow_empty = true",
        next="lower clients.count, choose a less skewed partition, or set partition.allow_empty = true",
    )


def _checked(shares: Sequence[Ints], samples: int, clients: int) -> list[Ints]:
    """The shares as int64 arrays, after making sure that they are a partition of range(samples)."""
    if not isinstance(shares, list | tuple) or len(shares) != clients:
        given = f"{len(shares)} shares" if isinstance(shares, list | tuple) else type(shares).__name__
        raise _not_a_partition(f"gives {given} for {clients} clients")
    arrays = [np.asarray(share) for share in shares]
    if any(array.ndim != 1 or (array.size and array.dtype.kind not in "iu") for array in arrays):
        raise _not_a_partition("gives shares that are no flat arrays of whole numbers")
    positions = np.concatenate(arrays).astype(np.int64)
    outside = np.count_nonzero((positions < 0) | (positions >= samples))
    if outside:
        raise _not_a_partition(f"gives {outside} positions outside 0..{samples - 1}")
    owners = np.bincount(positions, minlength=samples)
    if (owners != 1).any():
        twice, never = np.count_nonzero(owners > 1), np.count_nonzero(owners == 0)
        raise _not_a_partition(f"gives {twice} samples to several clients and {never} samples to none")
    return [array.astype(np.int64) for array in arrays]


def _not_a_partition(what: str) -> ScenarioError:
    return ScenarioError(
        f"the partition rule {what}",
        where="partition.name",
        allowed="a list with one array of positions per client; together they name each sample once",
        next="mend the rule: every position in 0..len(labels) - 1 belongs to exactly one client",
    )


def _dirichlet_equal(labels: Ints, clients: int, section: PartitionSection, rng: Rng) -> list[Ints]:
    """The MFCL authors' rule: equal sizes, each client's label mix ~ Dirichlet(alpha) while classes last.

    Clients draw in turn and without replacement, so late ones take what is left and the realised mixes are
    more skewed than Dirichlet(alpha) for a large alpha (arXiv 2311.07784, create_lda_partitions of its code).
    """
    sizes = _equal_sizes(len(labels), clients, section)
    left = np.unique(labels, return_counts=True)[1]
    mixes = rng.dirichlet(np.full(len(left), section.alpha), size=clients)
    drawn = []
    for mix, size in zip(mixes, sizes.tolist(), strict=True):
        drawn.append(_draw_classes(mix, size, left, rng))
        left = left - np.bincount(drawn[-1], minlength=len(left))
    # The j-th draw of a class takes the j-th of its shuffled samples.
    positions = np.empty_like(labels)
    positions[np.argsort(np.concatenate(drawn), kind="stable")] = _sorted_by_label(labels, rng)
    return _cut(positions, sizes)


def _equal_sizes(samples: int, clients: int, section: PartitionSection) -> Ints:
    if samples % clients and section.remainder == "refuse":
        fewer = max(n for n in range(1, min(clients, samples) + 1) if samples % n == 0)
        more = next((n for n in range(clients, samples + 1) if samples % n == 0), samples)
        raise ScenarioError(
            f"{samples} samples cannot be shared equally among {clients} clients",
            where="partition.remainder",
            allowed=f"a clients.count that divides {samples} (nearest: {fewer} or {more}),"
            ' or partition.remainder = "spread"',
            next='change clients.count, or set partition.remainder = "spread":'
            f" {samples % clients} clients get one sample more",
        )
    return _even_sizes(samples, clients)


def _draw_classes(mix: Floats, size: int, left: Ints, rng: Rng) -> Ints:
    """Classes (size,) of one client's samples, drawn from ``mix`` (classes,) without going beyond ``left``.

    A draw changes the chances of the next one only if it takes the last sample of a class; up to there all
    draws are independent and can be made at once.
    """
    drawn = np.empty(0, dtype=np.int64)
    while len(drawn) < size:
        rest = left - np.bincount(drawn, minlength=len(left))
        mix = _without_empty(mix, rest)
        drawn = np.concatenate([drawn, _draw_until_empty(mix, size - len(drawn), rest, rng)])
    return drawn


def _without_empty(mix: Floats, left: Ints) -> Floats:
    raised: Floats = np.where(left > 0, mix + EPS, 0.0)
    chances: Floats = raised / (raised.sum() + np.finfo(np.float64).eps)
    return chances


def _draw_until_empty(mix: Floats, size: int, left: Ints, rng: Rng) -> Ints:
    """At most ``size`` independent draws, the last of them being the one that empties a class."""
    chances = np.cumsum(mix)
    drawn = np.searchsorted(chances / chances[-1], rng.random(size), side="right")
    emptied = np.flatnonzero((left > 0) & (np.bincount(drawn, minlength=len(left)) >= left))
    ends = [np.flatnonzero(drawn == k)[left[k] - 1] + 1 for k in emptied]
    return drawn[: min(ends, default=size)]


def _dirichlet(labels: Ints, clients: int, section: PartitionSection, rng: Rng) -> list[Ints]:
    """Each class is cut among the clients by p ~ Dirichlet(alpha * 1_clients), so sizes differ as well."""
    least = _least(len(labels), clients, section)
    in_class = np.unique(labels, return_counts=True)[1]
    tries, fewest = 0, clients  # draws, and clients with too little in the best of them
    while tries < TRIES and not (tries == HOPELESS_TRIES and fewest > HOPELESS_CLIENTS):
        tries += 1
        counts = _dirichlet_counts(in_class, clients, section.alpha, rng)
        fewest = min(fewest, int(np.count_nonzero(counts.sum(axis=0) < least)))
        if fewest == 0:
            owners = np.repeat(np.tile(np.arange(clients), len(in_class)), counts.ravel())
            return _by_owner(_sorted_by_label(labels, rng), owners, clients)
    raise ScenarioError(
        f"{tries} draws never gave each of {clients} clients at least {least} of {len(labels)} samples",
        where="partition.alpha",
        allowed=f"an alpha well above {section.alpha}, fewer clients, or partition.allow_empty = true",
        next="raise partition.alpha, lower clients.count or partition.min_size, or set partition.allow_empty = true",
    )


def _dirichlet_counts(in_class: Ints, clients: int, alpha: float, rng: Rng) -> Ints:
    """How many samples of each class each client gets, (classes, clients)."""
    shares = rng.dirichlet(np.full(clients, alpha), size=len(in_class))
    cuts = np.floor(np.cumsum(shares, axis=1) * in_class[:, None]).astype(np.int64)
    cuts = np.minimum(cuts, in_class[:, None])
    cuts[:, -1] = in_class
    return np.diff(cuts, axis=1, prepend=0)


def _iid(labels: Ints, clients: int, _section: PartitionSection, rng: Rng) -> list[Ints]:
    """A permutation in equal pieces; the first clients get one sample more if it does not divide."""
    return _cut(rng.permutation(len(labels)), _even_sizes(len(labels), clients))


def _shards(labels: Ints, clients: int, section: PartitionSection, rng: Rng) -> list[Ints]:
    """Samples sorted by label and cut into shards, as many for each client (arXiv 1602.05629)."""
    if section.shards_per_client > len(labels):
        raise ScenarioError(
            f"{len(labels)} samples cannot be cut into {section.shards_per_client} shards for each client",
            where="partition.shards_per_client",
            allowed=f"1 to {len(labels)}",
            next="lower partition.shards_per_client",
        )
    owner_of_shard = rng.permutation(np.repeat(np.arange(clients), section.shards_per_client))
    owners = np.repeat(owner_of_shard, _even_sizes(len(labels), len(owner_of_shard)))
    return _by_owner(_sorted_by_label(labels, rng), owners, clients)


def _classes(labels: Ints, clients: int, section: PartitionSection, rng: Rng) -> list[Ints]:
    """Each client owns some classes of the task; a class is split evenly among its owners."""
    in_class = np.unique(labels, return_counts=True)[1]
    owned = _own_classes(len(in_class), clients, section.classes_per_client, rng)
    owners = []
    for k, size in enumerate(in_class.tolist()):
        who = rng.permutation(np.flatnonzero((owned == k).any(axis=1)))
        owners.append(np.repeat(who, _even_sizes(size, len(who))))
    return _by_owner(_sorted_by_label(labels, rng), np.concatenate(owners), clients)


def _own_classes(classes: int, clients: int, each: int, rng: Rng) -> Ints:
    """``each`` different classes of every client, (clients, each), such that each class has an owner."""
    if each > classes or clients * each < classes:
        raise ScenarioError(
            f"{clients} clients with {each} classes each cannot own the {classes} classes between them",
            where="partition.classes_per_client",
            allowed=f"{-(-classes // clients)} to {classes}",
            next="change partition.classes_per_client, clients.count or stream.tasks",
        )
    owned = np.argsort(rng.random((clients, classes)), axis=1)[:, :each]
    owners = np.bincount(owned.ravel(), minlength=classes)
    for missing in np.flatnonzero(owners == 0):  # there is always a class with two owners to take one from
        place = rng.choice(np.flatnonzero(owners[owned.ravel()] > 1))
        owners[owned.flat[place]] -= 1
        owners[missing] = 1
        owned.flat[place] = missing
    return owned


def _quantity(labels: Ints, clients: int, section: PartitionSection, rng: Rng) -> list[Ints]:
    """IID samples, unequal sizes: min_size for each client, the rest in proportion to log-normal draws."""
    least = _least(len(labels), clients, section)
    weights = np.cumsum(rng.lognormal(0.0, section.sigma, size=clients))
    if not np.isfinite(weights[-1]):
        raise ScenarioError(
            f"client sizes by a deviation of {section.sigma:g} are no numbers any more",
            where="partition.sigma",
            allowed="about 100 at most",
            next="lower partition.sigma",
        )
    ends = np.round(weights / weights[-1] * (len(labels) - least * clients)).astype(np.int64)
    return _cut(rng.permutation(len(labels)), least + np.diff(ends, prepend=0))


def _least(samples: int, clients: int, section: PartitionSection) -> int:
    """The fewest samples a client may get; ScenarioError if there are not enough for all."""
    least = 0 if section.allow_empty else max(1, section.min_size)
    if least * clients > samples:
        raise ScenarioError(
            f"{clients} clients with at least {least} samples each need more than {samples} samples",
            where="partition.min_size",
            allowed=f"a min_size up to {samples // clients}, or partition.allow_empty = true",
            next="lower partition.min_size or clients.count",
        )
    return least


def _sorted_by_label(labels: Ints, rng: Rng) -> Ints:
    """All positions, class after class, shuffled inside each class."""
    shuffled = rng.permutation(len(labels))
    return shuffled[np.argsort(labels[shuffled], kind="stable")]


def _even_sizes(samples: int, parts: int) -> Ints:
    """Sizes (parts,) that differ by at most one, larger ones first."""
    return samples // parts + (np.arange(parts) < samples % parts).astype(np.int64)


def _cut(positions: Ints, sizes: Ints) -> list[Ints]:
    return np.split(positions, np.cumsum(sizes)[:-1])


def _by_owner(positions: Ints, owners: Ints, clients: int) -> list[Ints]:
    """``positions[i]`` goes to client ``owners[i]``."""
    return _cut(positions[np.argsort(owners, kind="stable")], np.bincount(owners, minlength=clients))


RULES: dict[str, Rule] = {
    "dirichlet_equal": _dirichlet_equal,
    "dirichlet": _dirichlet,
    "iid": _iid,
    "shards": _shards,
    "classes": _classes,
    "quantity": _quantity,
}
