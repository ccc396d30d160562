"""The contract of a method: a frozen value of functions, of which a method fills those in which it is not FedAvg.

What a function gets is all it may use; what it needs later it returns. Nothing is inherited.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor
from torch.nn import functional as F

from fedcil.compute import Compute
from fedcil.errors import RunFailed
from fedcil.keys import Key
from fedcil.messages import Payload
from fedcil.models.network import Network
from fedcil.state import ServerState
from fedcil.stream import Task
from fedcil.tensors import Contribution, Tensors, Total

Prepared = Any
"""Whatever a method's ``prepare`` returned; only that method looks inside."""
Draws = Any
"""Whatever a method's ``draw`` returned."""
Made = TypeVar("Made")
Who = Literal["sampled", "all"]
Work = Literal["train", "fit", "remember"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Rounds of one kind inside a task.

    ``work``: local SGD (``train``), the method's own ``fit``, or ``remember`` (client state only, nothing is
    sent). Raises ValueError for other words.
    """

    name: str
    rounds: int
    who: Who = "sampled"
    work: Work = "train"

    def __post_init__(self) -> None:
        for name, words in (("who", Who), ("work", Work)):
            if getattr(self, name) not in get_args(words):
                raise ValueError(f"Phase({name}={getattr(self, name)!r}); allowed: {', '.join(get_args(words))}")
        if self.rounds < 1:
            raise ValueError(f"Phase(rounds={self.rounds!r}); allowed: 1 or more")

    @property
    def sends_model(self) -> bool:
        """Whether limits and robust folds (fedcil/rule.py) are for this phase."""
        return self.work == "train"


@dataclass(frozen=True, slots=True)
class Samples:
    """Training images of one client as they are stored: uint8 (n, h, w, c), labels (n,) int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's real images (b, c, h, w), float and normalised, with labels (b,) in [0, task.seen).

    ``anchor``: the parameters that the round started from, in the order of ``model.parameters()``.
    """

    images: Tensor
    labels: Tensor
    task: Task
    anchor: tuple[Tensor, ...]


TRAINABLE = 2  # samples: batch norm cannot train on one

DataOf = Literal["task", "so_far"]
"""Which samples a client trains on: of this task, or of all that it has had."""

Progress = Callable[[int, int, Mapping[str, float]], None]
"""(step, steps, loss terms): called at each step of a boundary; may raise Stopped."""


@dataclass(frozen=True, slots=True)
class Notice:
    """A warning for people: ``{classes}`` in the text stands for the names of the classes with these labels."""

    text: str
    labels: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Boundary:
    """What the end of a task made: the new state, figures for the record, and warnings for people."""

    state: ServerState
    log: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[Notice, ...] = ()


@dataclass(frozen=True, slots=True)
class ClientMemory:
    """What a client keeps between rounds, as named tensors that live where the client lives.

    ``join(own, kept) -> Samples`` gives the samples to train on; ``update(network, own, kept, task, images)
    -> kept`` makes the next version in a ``remember`` phase. ``kept`` is None until a client's
    first ``remember``.
    """

    join: Callable[[Samples, Tensors | None], Samples]
    update: Callable[[Network, Samples, Tensors | None, Task, Callable[[Tensor], Tensor]], Tensors]


def train_only(task: Task, rounds: int) -> tuple[Phase, ...]:
    return (Phase(name="train", rounds=rounds),)


def nothing_to_prepare(compute: Compute, task: Task, payload: Payload | None, key: Key) -> Prepared:
    return None


def nothing_to_draw(prepared: Prepared, real: int, task: Task, key: Key) -> Draws:
    return None


def cross_entropy_seen(model: Network, prepared: Prepared, batch: Batch, draws: Draws) -> Tensor:
    """Cross-entropy over all classes seen so far; returns ()."""
    return F.cross_entropy(model(batch.images), batch.labels)


def replace_model(state: ServerState, phase: Phase, total: Total | None) -> ServerState:
    """The mean becomes the model; without contributions nothing changes."""
    return state if total is None else replace(state, model=total.mean())


def no_boundary(state: ServerState, task: Task, key: Key, compute: Compute, progress: Progress) -> Boundary:
    return Boundary(state)


def predict_with_head(network: Network, memory: Tensors, images: Tensor) -> Tensor:
    """Scores (n, classes seen) for images (n, c, h, w)."""
    scores: Tensor = network(images)
    return scores


def one_norm_update(task: Task) -> int:
    return 1


def no_fit(network: Network, samples: Samples, task: Task, images: Callable[[Tensor], Tensor]) -> Contribution:
    raise TypeError("this method has no phase of work 'fit'")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method. Defaults are FedAvg's; see the type of each default for what a field is given and returns.

    Attributes:
        data: a client trains on its samples of this task, or on all it has had so far.
        takes_old_labels: the loss takes labels of earlier tasks, so a client that stays behind with an earlier
            task's samples (population ``growing``) may train; if not, it is not asked.
        phases: rounds of a task, by kind.
        prepare: once per task and process, from the payload: frozen networks, a pool.
        draw: all randomness of one step, as tensors.
        loss: a pure function to a scalar; the shared local SGD does the rest.
        fit: samples to contribution, for phases that are no gradient descent. ``images`` turns stored
            uint8 images into normalised ones.
        norm_updates: how often a step updates batch norm's running statistics with its batch.
        client_memory: what clients keep, if anything.
        reduce: puts a round's total into the state: its ``mean()``, or its ``tensors``, each times its client's weight
            and summed.
        boundary: the end of a task that is not the last; sees model and memory, never data.
        predict: scores for evaluation.
    """

    data: DataOf = "task"
    takes_old_labels: bool = True
    phases: Callable[[Task, int], tuple[Phase, ...]] = train_only
    prepare: Callable[[Compute, Task, Payload | None, Key], Prepared] = nothing_to_prepare
    draw: Callable[[Prepared, int, Task, Key], Draws] = nothing_to_draw
    loss: Callable[[Network, Prepared, Batch, Draws], Tensor] = cross_entropy_seen
    fit: Callable[[Network, Samples, Task, Callable[[Tensor], Tensor]], Contribution] = no_fit
    norm_updates: Callable[[Task], int] = one_norm_update
    client_memory: ClientMemory | None = None
    reduce: Callable[[ServerState, Phase, Total | None], ServerState] = replace_model
    boundary: Callable[[ServerState, Task, Key, Compute, Progress], Boundary] = no_boundary
    predict: Callable[[Network, Tensors, Tensor], Tensor] = predict_with_head

    def __post_init__(self) -> None:
        if self.data not in get_args(DataOf):
            raise ValueError(f"Method(data={self.data!r}): allowed are {', '.join(map(repr, get_args(DataOf)))}")
        for each in fields(self):
            given = getattr(self, each.name)
            if callable(each.default) and not callable(given):
                raise ValueError(f"Method({each.name}={given!r:.100}): it must be a function")


def prefixed(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """Tensors of one part of a payload: ``teacher`` -> names ``teacher.…``."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def part(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """The inverse of ``prefixed``."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def returned(made: object, kind: type[Made], function: str) -> Made:
    """What a method's ``function`` returned; RunFailed if that is not what the contract says."""
    if isinstance(made, kind):
        return made
    raise RunFailed(
        f"the method's {function} returned {type(made).__name__}, not a {kind.__module__}.{kind.__name__}",
        where="method",
        next="mend it, then `fedcil resume RUN`; docs/extending.md has the contract",
    )
