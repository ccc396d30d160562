"""(a) MFCL's client step on ResNet-18: fedcil's local training against a plain twin of the authors' program.

The twin has the authors' order of passes (``authors_order.py``), a ``DataLoader`` over PIL images with the transforms
of their data code, and ``torch.optim.SGD`` as it comes. Both train the same network, generator and teacher on the same
images; speed does not depend on what is in them. Each side is a process of its own (``peers/ours.py``,
``peers/authors.py``); the twin is in fp32 in all rows, once as the C library comes and once with freed memory kept.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from client.training import Recipe, local_sgd
from fedcil.compute import Compute, Precision
from fedcil.data.augment import make_batch
from fedcil.keys import Key
from fedcil.messages import Payload
from fedcil.methods.base import Method, Prepared, Samples, prefixed
from fedcil.methods.mfcl import MFCL
from fedcil.models import make_architecture
from fedcil.models.network import initialise, load_state, snapshot
from fedcil.stream import Task
from fedcil.tables import ModelSection, TrainingSection
from scenarios.benchmarks import authors_order
from scenarios.benchmarks.peers.session import sessions
from scenarios.benchmarks.plain import MEAN, STD, Pictures
from scenarios.benchmarks.timing import Case, Figure, against, in_turn, median_cpu

M = TypeVar("M", bound=torch.nn.Module)
KEY = Key(0).at("benchmark")
SHAPE = (3, 32, 32)
KINDS = ("fresh", "pooled")
TASK = Task(1, 50, 60)  # 50 old classes, 10 new ones
RELEASED = MFCL.presets["authors-code"]
TRAINING = TrainingSection(epochs=1, lr=0.01, lr_end=0.01)  # lr, weight decay and momentum of both sides
POOL = 4096  # images; a scenario draws from it at each of STEPS_PER_TASK steps
POOL_TIMED = 32  # images: what one costs does not depend on how many there are
STEPS_PER_TASK = 40 * 500  # the paper's: 10 epochs x 4 batches for 5 clients in each of 100 rounds


@dataclass(frozen=True, slots=True)
class Sizes:
    """Real and synthetic images of a step, and how many steps are timed at once."""

    real: int
    synthetic: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.real}_{self.synthetic}"


FULL = Sizes(32, 128, 1)
SMALL = Sizes(8, 32, 4)
QUICK = replace(SMALL, steps=1)


def compute_in(precision: Precision, width: int = 64) -> Compute:
    architecture = make_architecture(ModelSection(name="resnet18", width=width), SHAPE, KEY)
    return Compute(architecture, torch.device("cpu"), precision)


def stored_images(count: int) -> Samples:
    """Random pixels as a data set stores them, with labels of the new classes."""
    draws = KEY.at("images").numpy()
    images = torch.from_numpy(draws.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))
    return Samples(images, torch.from_numpy(draws.integers(TASK.old, TASK.seen, count)))


def drawn(module: M, name: str) -> M:
    """Initialised. Draws fill memory in its order: they are the same for both sides if it is laid out as torch does."""
    initialise(module, KEY.at(name).torch())
    return module


def make_payload(settings: MFCL, compute: Compute) -> Payload:
    """A teacher of the old classes and a generator, as a boundary would hand them out."""
    generator = drawn(settings.make_generator(compute), "generator")
    teacher = drawn(compute.architecture.build(TASK.old), "teacher")
    return Payload.of(prefixed("teacher", snapshot(teacher)) | prefixed("generator", snapshot(generator)))


def our_step(sizes: Sizes, precision: Precision, pool: int) -> Callable[[], object]:
    """fedcil's local training of one client: an epoch of ``sizes.steps`` batches."""
    compute = compute_in(precision)
    settings = MFCL(**RELEASED | {"synthetic": sizes.synthetic, "pool": pool})
    method, payload = settings.build(), make_payload(settings, compute)
    prepared = method.prepare(compute, TASK, payload, KEY.at("prepare"))
    samples = stored_images(sizes.real * sizes.steps)
    model, start = compute.network(TASK.seen), snapshot(drawn(compute.architecture.build(TASK.seen), "student"))
    return partial(_train_ours, model, start, method, prepared, samples, sizes.real)


def _train_ours(
    model: torch.nn.Module, start: dict[str, Tensor], method: Method, prepared: Prepared, samples: Samples, batch: int
) -> None:
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    load_state(model, start)
    recipe = Recipe(
        method,
        prepared,
        TASK,
        TRAINING.model_copy(update={"batch_size": batch}),
        lr=TRAINING.lr,
        augment=lambda images, index, draws: make_batch(images, index, "crop_flip", draws, mean, std),
    )
    local_sgd(model, recipe, samples, KEY.at("client"))


def plain_step(sizes: Sizes) -> Callable[[], object]:
    """The twin: the same work as the authors' program does it, in fp32."""
    compute = compute_in("fp32")
    settings = MFCL(**RELEASED | {"synthetic": sizes.synthetic})
    student = drawn(compute.architecture.build(TASK.seen), "student")
    teacher = drawn(compute.architecture.build(TASK.old), "teacher")
    generator = drawn(settings.make_generator(compute), "generator")
    samples = stored_images(sizes.real * sizes.steps)
    pictures = Pictures(samples.images.numpy(), samples.labels.numpy())
    start = snapshot(student)
    weights: Any = {"w_ft": settings.w_ft, "w_kd": settings.w_kd, "updates": settings.bn_updates}

    def batches() -> Iterator[authors_order.Batch]:
        for images, labels in DataLoader(pictures, sizes.real, shuffle=True):
            yield images, labels, torch.randn(sizes.synthetic, settings.latent)

    def train() -> None:
        load_state(student, start)
        optimizer = torch.optim.SGD(
            student.parameters(), TRAINING.lr, TRAINING.momentum, weight_decay=TRAINING.weight_decay
        )
        for batch in batches():
            loss = authors_order.loss(student, teacher, generator, batch, **weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return train


def our_pool(precision: Precision, images: int) -> Callable[[], object]:
    """The making of a pool: the generator's images and the teacher's logits."""
    compute = compute_in(precision)
    settings = MFCL(**RELEASED | {"pool": images})
    method, payload = settings.build(), make_payload(settings, compute)
    return lambda: method.prepare(compute, TASK, payload, KEY.at("prepare"))


def our_steps(sizes: Sizes, precisions: Sequence[str]) -> dict[str, Callable[[], object]]:
    """``<precision>_<fresh, pooled or pool>``."""
    cases: dict[str, Callable[[], object]] = {}
    for name in precisions:
        precision = cast(Precision, name)
        cases[f"{name}_fresh"] = our_step(sizes, precision, 0)
        cases[f"{name}_pooled"] = our_step(sizes, precision, 2 * sizes.synthetic)
        cases[f"{name}_pool"] = our_pool(precision, POOL_TIMED)
    return cases


def measure(sizes: Sizes, repeats: int, log: Path, precisions: tuple[Precision, ...]) -> dict[str, Figure]:
    """``step_<sizes>_<precision>_<fresh or pooled>``, and ``..._vs_kept`` against the twin that keeps freed memory;
    pooled rows carry the pool's cost over a task's steps.
    """
    numbers = sizes.real, sizes.synthetic, sizes.steps
    twins = {"": ("authors",), "_vs_kept": ("authors", "kept")}
    with sessions(
        log, {name: (sys.executable, *words) for name, words in (twins | {"ours": ("ours",)}).items()}
    ) as sides:
        cases: dict[str, Case] = {twin: sides[twin].case(sizes.steps) for twin in twins}
        for precision in precisions:
            for kind in KINDS:
                cases[f"{precision}_{kind}"] = sides["ours"].case(sizes.steps, f"{precision}_{kind}")
            cases[f"{precision}_pool"] = sides["ours"].case(POOL_TIMED, f"{precision}_pool")
        for twin in twins:
            sides[twin].begin("step", *numbers)
        sides["ours"].begin("step", *numbers, *precisions)
        costs = in_turn(cases, repeats)
    figures: dict[str, Figure] = {}
    for precision, kind, twin in itertools.product(precisions, KINDS, twins):
        figure = against(costs[f"{precision}_{kind}"], costs[twin])
        if kind == "pooled":
            pool = median_cpu(costs[f"{precision}_pool"]) * POOL / STEPS_PER_TASK
            figure = figure.plus(pool, median_cpu(costs[twin]))
        figures[f"step_{sizes.name}_{precision}_{kind}{twin}"] = figure
    return figures
