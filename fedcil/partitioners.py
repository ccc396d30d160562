"""The ways to share one task's samples among clients: ``partition.name`` is a name in the table at the end.

A partitioner is a pure function ``partitioner(labels, clients, section, rng)``: ``labels`` (n,) are the stream labels
of one task's samples, and it gives one array of positions in ``labels`` for each client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedcil.errors import ScenarioError

if TYPE_CHECKING:
    from fedcil.tables import PartitionSection

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Rng = np.random.Generator
Partitioner = Callable[[Ints, int, "PartitionSection", Rng], Sequence[Ints]]

TRIES = 1000  # draws of dirichlet before it gives up,
HOPELESS_TRIES, HOPELESS_CLIENTS = 10, 100  # or after so few, if each left more clients than this with too little
EPS = 1e-5  # what the MFCL authors add to every class that still has samples


def _dirichlet_equal(labels: Ints, clients: int, section: PartitionSection, rng: Rng) -> list[Ints]:
    """The MFCL authors' way: equal sizes, each client's label mix ~ Dirichlet(alpha) while classes last.

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


PARTITIONERS: dict[str, Partitioner] = {
    "dirichlet_equal": _dirichlet_equal,
    "dirichlet": _dirichlet,
    "iid": _iid,
    "shards": _shards,
    "classes": _classes,
    "quantity": _quantity,
}
