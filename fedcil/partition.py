"""Who owns which training sample: each task's samples, shared among the clients by a partitioner.

Its answer is checked, also that of your own, ``package.module:function``: every sample goes to exactly one client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fedcil.dotted import load_dotted, own_code
from fedcil.errors import InputError, ScenarioError
from fedcil.files import write_atomic
from fedcil.partitioners import PARTITIONERS, Ints, Partitioner, Rng

if TYPE_CHECKING:
    from fedcil.keys import Key
    from fedcil.stream import Stream, Task
    from fedcil.tables import PartitionSection


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
    the ids of those who share it, all clients by default; the others get nothing. Raises ScenarioError if the
    partitioner cannot serve that many clients, or leaves one without samples that may not be.
    """
    places = [key.at("partition", task.index) for task in stream.tasks]
    owners = [sharing(task.index) if sharing else np.arange(clients) for task in stream.tasks]
    if any(len(ids) < clients for ids in owners):  # newcomers have the highest ids: they shall not be served last
        owners = [place.at("owners").numpy().permutation(ids) for place, ids in zip(places, owners, strict=True)]
    return tuple(
        _share_task(section, clients, ids, task, labels, place)
        for task, ids, place in zip(stream.tasks, owners, places, strict=True)
    )


def save_partition(path: str | Path, parts: Sequence[TaskPartition]) -> None:
    """Write ``task<i>_indices`` and ``task<i>_offsets`` of each task to an npz file, whole or not at all."""
    arrays: dict[str, Any] = {}
    for task, part in enumerate(parts):
        arrays |= {f"task{task}_indices": part.indices, f"task{task}_offsets": part.offsets}
    content = BytesIO()
    np.savez(content, **arrays)  # numbers: nothing to pickle
    write_atomic(Path(path), content.getvalue())


def digest_of_partition(parts: Sequence[TaskPartition]) -> str:
    """Of who has which samples in which task."""
    hasher = blake2b(digest_size=16)
    for part in parts:
        hasher.update(np.ascontiguousarray(part.indices).data)
        hasher.update(np.ascontiguousarray(part.offsets).data)
    return hasher.hexdigest()


def load_partition(path: str | Path) -> tuple[TaskPartition, ...]:
    """Read what save_partition wrote. Raises InputError if the file is missing or broken."""
    try:
        with Path(path).open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            tasks = sum(name.endswith("_offsets") for name in arrays.files)
            return tuple(_load_task(arrays, task) for task in range(max(1, tasks)))
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
    """``owners[i]`` gets the partitioner's i-th share."""
    members = np.flatnonzero((labels >= task.old) & (labels < task.seen))
    partitioner, sharing = _load_partitioner(section.name), len(owners)
    counts = np.zeros(clients, dtype=np.int64)
    try:
        _refuse_too_few_samples(len(members), sharing, section)
        shares = _checked(_call(partitioner, labels[members], sharing, section, key.numpy()), len(members), sharing)
        counts[owners] = [len(share) for share in shares]
        _refuse_empty_client(counts, np.sort(owners), section)
    except ScenarioError as error:  # partitioners do not know which task they share
        raise ScenarioError(
            f"task {task.index + 1}: {error.what}", where=error.where, allowed=error.allowed, next=error.next
        ) from None
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
    by_client = np.concatenate([shares[place] for place in np.argsort(owners)])
    return TaskPartition(members[by_client].astype(np.int32), offsets)


def _call(partitioner: Partitioner, labels: Ints, clients: int, section: PartitionSection, rng: Rng) -> Sequence[Ints]:
    with nullcontext() if section.name in PARTITIONERS else own_code(section.name, "partition.name"):
        return partitioner(labels, clients, section, rng)


def _load_partitioner(name: str) -> Partitioner:
    if name in PARTITIONERS:
        return PARTITIONERS[name]
    partitioner: Partitioner = load_dotted(name, "partition.name")
    return partitioner


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
            allowed="newcomers, or old members that move on, at each task boundary",
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
    try:
        arrays = [np.asarray(share) for share in shares]
    except (TypeError, ValueError):  # rows of several lengths
        arrays = [np.asarray(None)]
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
        f"the partitioner {what}",
        where="partition.name",
        allowed="a list with one array of positions per client; together they name each sample once",
        next="mend it: every position in 0..len(labels) - 1 belongs to exactly one client",
    )
