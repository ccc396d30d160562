"""(a) MFCL's client step on ResNet-18: fedcil's local training against a plain twin of the authors' program.

The twin has the authors' order of passes (``authors_order.py``), a ``DataLoader`` over PIL images with the transforms
of their data code, and ``torch.optim.SGD`` as it comes. Both train the same network, generator and teacher on the same
images; speed does not depend on what is in them. The twin is a process of its own (``peers/authors.py``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

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
from fedcil.scenario import ModelSection, TrainingSection
from fedcil.stream import Task
from scenarios.benchmarks import authors_order
from scenarios.benchmarks.peers.session import sessions
from scenarios.benchmarks.plain import MEAN, STD, Pictures
from scenarios.benchmarks.timing import Case, Cost, Figure, against, in_turn, median_cpu, timed

M = TypeVar("M", bound=torch.nn.Module)
KEY = Key(0).at("benchmark")
SHAPE = (3, 32, 32)
TASK = Task(1, 50, 60)  # 50 old classes, 10 new ones
RELEASED = MFCL.presets["authors-code"]
POOL = 4096  # images; a scenario draws from it at each of STEPS_PER_TASK steps
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
        TrainingSection(epochs=1, batch_size=batch),
        lr=0.01,
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

    def batches() -> Iterator[authors_order.Batch]:
        for images, labels in DataLoader(pictures, sizes.real, shuffle=True):
            yield images, labels, torch.randn(sizes.synthetic, settings.latent)

    def train() -> None:
        load_state(student, start)
        optimizer = torch.optim.SGD(student.parameters(), 0.01, weight_decay=1e-5)
        for batch in batches():
            loss = authors_order.loss(student, teacher, generator, batch, w_ft=1.0, w_kd=0.1, updates=2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return train


def pool_cost(precision: Precision, images: int = 32) -> float:
    """CPU seconds for one image of a pool: the generator and the teacher's logits."""
    compute = compute_in(precision)
    settings = MFCL(**RELEASED | {"pool": images})
    method, payload = settings.build(), make_payload(settings, compute)
    work = timed(lambda: method.prepare(compute, TASK, payload, KEY.at("prepare")), images)
    work()
    return median_cpu([work() for _ in range(3)])


def measure_ours(sizes: Sizes, precision: Precision, repeats: int) -> float:
    """CPU seconds of a fresh step, by itself."""
    costs = in_turn({"ours": timed(our_step(sizes, precision, 0), sizes.steps)}, repeats)
    return median_cpu(costs["ours"])


def measure(sizes: Sizes, repeats: int, log: Path, precisions: tuple[Precision, ...]) -> dict[str, Figure]:
    """``step_<sizes>_<precision>_<fresh or pooled>``; pooled rows carry the pool's cost over a task's steps."""
    with sessions(log, {"authors": (sys.executable, "authors")}) as sides:
        cases: dict[str, Case] = {"plain": sides["authors"].case(sizes.steps)}
        for precision in precisions:
            for kind, pool in (("fresh", 0), ("pooled", 2 * sizes.synthetic)):
                cases[f"{precision}_{kind}"] = timed(our_step(sizes, precision, pool), sizes.steps)
        sides["authors"].begin("step", sizes.real, sizes.synthetic, sizes.steps)
        costs = in_turn(cases, repeats)
    plain: list[Cost] = costs.pop("plain")
    figures = {f"step_{sizes.name}_{name}": against(ours, plain) for name, ours in costs.items()}
    for precision in precisions:
        name = f"step_{sizes.name}_{precision}_pooled"
        figures[name] = figures[name].plus(pool_cost(precision) * POOL / STEPS_PER_TASK, median_cpu(plain))
    return figures
