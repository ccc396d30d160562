"""The rungs of the ladder: one round of MFCL's local training, in as many ways as might be fast on a GPU.

Each rung is a function that is given the material and returns a round: a call that trains every client from the same
start and returns the mean of their weights, so that all rungs can be held against the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from client.lanes import Lane, local_sgd_in_lanes, make_streams
from client.training import LocalSGD, Recipe, local_sgd
from fedcil.capture import repeatable
from fedcil.compute import Precision
from fedcil.methods.adam import Adam
from fedcil.methods.base import Batch, part
from fedcil.methods.inversion import generator_loss
from fedcil.methods.replay import Replay
from fedcil.models.network import Network, initialise, load_state, set_norm_updates, snapshot, state_of
from fedcil.tensors import Tensors
from scenarios.benchmarks import authors_order
from scenarios.benchmarks.material import KEY, TASK, Material, plain_networks
from scenarios.benchmarks.stacked import WideTeachers, local_sgd_stacked
from scenarios.benchmarks.step import POOL

Round = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Rung:
    """``open(material)`` -> a round. ``exact``: gives the weights of ``base`` up to rounding."""

    what: str
    open: Callable[[Material], Round]
    precision: Precision
    base: str = "authors"
    exact: bool = True
    autotune: bool = False  # cuDNN tries its kernels for each new shape

    def start(self, material: Material) -> Tensors:
        """What a round of this rung starts from."""
        return Boundary(material).images() if self.base == "generator" else material.start


def authors(m: Material) -> Round:
    """Two student and three teacher passes, PIL and DataLoader, torch.optim.SGD."""
    student, teacher, generator = plain_networks(m)

    def clients() -> Iterator[Tensors]:
        for client in range(m.work.clients):
            load_state(student, m.start)
            optimizer = torch.optim.SGD(student.parameters(), m.lr, weight_decay=m.training.weight_decay)
            for batch in m.pictures(client):
                loss = authors_order.loss(student, teacher, generator, batch, w_ft=1.0, w_kd=0.1, updates=2)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            yield state_of(student)

    return lambda: m.mean_of(clients())


def merged(m: Material) -> Round:
    """One student and one teacher pass; the images still come from PIL and DataLoader."""
    student = momentum_of_two(m.student())

    def clients() -> Iterator[Tensors]:
        for client in range(m.work.clients):
            load_state(student, m.start)
            optimizer = torch.optim.SGD(student.parameters(), m.lr, weight_decay=m.training.weight_decay)
            for images, labels, latents in m.pictures(client):
                loss = m.method.loss(student, m.prepared, Batch(images, labels, TASK, ()), latents)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            yield state_of(student)

    return lambda: m.mean_of(clients())


def product(m: Material) -> Round:
    """fedcil's own local training, one client after the other."""
    student = m.student()

    def clients() -> Iterator[Tensors]:
        for client in range(m.work.clients):
            load_state(student, m.start)
            local_sgd(student, recipe(m), m.samples[client], m.keys[client])
            yield state_of(student)

    return lambda: m.mean_of(clients())


def stacked(m: Material, at_once: int) -> Round:
    """So many clients as one model."""
    student = m.student()
    compute = WideTeachers(m.compute.architecture, m.compute.device, m.compute.precision)
    prepared = m.method.prepare(compute, TASK, m.payload, KEY.at("prepare"))
    together = replace(recipe(m), prepared=prepared)

    def clients() -> Iterator[Tensors]:
        load_state(student, m.start)
        for first in range(0, m.work.clients, at_once):
            some = slice(first, first + at_once)
            yield from (state for state, _ in local_sgd_stacked(student, together, m.samples[some], m.keys[some]))

    return lambda: m.mean_of(clients())


def ahead(m: Material) -> Round:
    """Generator and teacher in one large batch for all steps of a client, ahead of the student."""
    student = momentum_of_two(m.student())
    replay: Replay = m.prepared

    def clients() -> Iterator[Tensors]:
        for client in range(m.work.clients):
            load_state(student, m.start)
            optimizer = LocalSGD(list(student.parameters()), m.lr, m.training)
            for images, labels, known in known_ahead(m, replay, client):
                optimizer.step(m.method.loss(student, known, Batch(images, labels, TASK, ()), None))
            yield state_of(student)

    return lambda: m.mean_of(clients())


@dataclass(frozen=True, slots=True)
class Known:
    """In place of ``Replay``: the mixed images and the teacher's logits of one step are there already."""

    teacher: Network
    both: Tensor
    past: Tensor

    def mix(self, real: Tensor, draws: object) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return self.both, self.past


@torch.no_grad()
def known_ahead(m: Material, replay: Replay, client: int) -> list[tuple[Tensor, Tensor, Known]]:
    images, labels, latents = m.epoch(client)
    sizes, made = m.work.sizes, replay.generator(torch.cat(latents))
    old, new = replay.teacher(images).split(sizes), replay.teacher(made).split(m.work.synthetic)
    steps = zip(images.split(sizes), labels.split(sizes), made.split(m.work.synthetic), old, new, strict=True)
    return [
        (real, y, Known(replay.teacher, torch.cat([real, synthetic]), torch.cat([of_real, of_made])))
        for real, y, synthetic, of_real, of_made in steps
    ]


def compiled(m: Material) -> Round:
    """torch.compile for student, teacher and generator, otherwise as ``product``."""
    replay: Replay = m.prepared
    for network in (replay.teacher, student := m.student()):
        network.backbone = torch.compile(network.backbone, dynamic=False)  # type: ignore[assignment]
    m.prepared = replace(replay, generator=torch.compile(replay.generator, dynamic=False))
    names = [name.replace("backbone._orig_mod.", "backbone.") for name in state_of(student)]

    def clients() -> Iterator[Tensors]:
        for client in range(m.work.clients):
            torch._foreach_copy_(list(state_of(student).values()), [m.start[name] for name in names])
            local_sgd(student, recipe(m), m.samples[client], m.keys[client])
            yield dict(zip(names, state_of(student).values(), strict=True))

    return lambda: m.mean_of(clients())


def lanes(m: Material, count: int) -> Round:
    """fedcil's captured steps, so many clients side by side."""
    places = [Lane(m.student(), m.training, stream) for stream in make_streams(count, m.compute.device)]

    def clients() -> Iterator[Tensors]:
        for first in range(0, m.work.clients, count):
            some = slice(first, first + count)
            trained = local_sgd_in_lanes(places, m.start, recipe(m), m.samples[some], m.keys[some])
            yield from (state for state, _ in trained)

    return lambda: m.mean_of(clients())


class Boundary:
    """The generator's training, a step at a time, over latents that stay where they are."""

    def __init__(self, m: Material) -> None:
        self.m, settings = m, m.settings
        self.classifier, self.weights = m.compute.frozen(part("teacher", m.payload.tensors)), settings.loss_weights()
        generator = settings.make_generator(m.compute)
        initialise(generator, KEY.at("generator").torch())
        self.generator = settings.place(generator, m.compute).train()
        self.start = snapshot(self.generator)
        self.optimizer = Adam(self.generator.parameters(), settings.generator_lr)
        self.fixed = self.latents(0)

    def latents(self, step: int) -> Tensor:
        size = (self.m.settings.generator_batch, self.m.settings.latent)
        return torch.randn(size, generator=KEY.at("latents", step).torch(self.m.device), device=self.m.device)

    def step(self) -> None:
        loss, _ = generator_loss(self.classifier, self.generator(self.fixed), self.weights)
        self.optimizer.step(loss)

    def train(self, step: Callable[[], object]) -> dict[str, Tensor]:
        """The images that come of it. Not the weights: Adam makes whole steps of the rounding of gradients that are 0,
        as those of a bias before a batch norm, which no image shows.
        """
        load_state(self.generator, self.start)
        self.optimizer.reset()
        for place in range(self.m.work.generator_steps):
            self.fixed.copy_(self.latents(place))
            step()
        return self.images()

    @torch.no_grad()
    def images(self) -> dict[str, Tensor]:
        """Of latents that no step has seen."""
        return {"images": self.generator(self.latents(-1))}


def generator_eager(m: Material) -> Round:
    boundary = Boundary(m)
    return lambda: boundary.train(boundary.step)


def generator_captured(m: Material) -> Round:
    boundary = Boundary(m)
    step = repeatable(boundary.step, m.device)
    return lambda: boundary.train(step)


def momentum_of_two(network: Network) -> Network:
    """Running statistics that move as in the authors' two passes."""
    set_norm_updates(network, 2)
    return network


def recipe(m: Material) -> Recipe:
    return Recipe(m.method, m.prepared, TASK, m.training, m.lr, m.augment)


RUNGS: dict[str, Rung] = {  # those that might leave a device in disorder come last
    "authors": Rung("authors' order, PIL, eager", authors, "fp32"),
    "merged": Rung("merged passes, PIL", merged, "fp32"),
    "resident": Rung("data on the device, augmented in batches", product, "fp32"),
    "tf32": Rung("the same in tf32", product, "tf32"),
    "bf16": Rung("the same in bf16", product, "bf16"),
    "autotune": Rung("bf16, cuDNN chooses by trying", product, "bf16", autotune=True),
    "ahead": Rung("generator and teacher ahead, large batches", ahead, "bf16"),
    "pool": Rung("synthetic images from a pool", product, "bf16", exact=False),
    "stacked2": Rung("2 clients as one model", partial(stacked, at_once=2), "bf16"),
    "stacked5": Rung("5 clients as one model", partial(stacked, at_once=5), "bf16"),
    "lane": Rung("captured steps, one lane", partial(lanes, count=1), "bf16"),
    "lanes2": Rung("captured steps, 2 lanes", partial(lanes, count=2), "bf16"),
    "lanes3": Rung("captured steps, 3 lanes", partial(lanes, count=3), "bf16"),
    "lanes5": Rung("captured steps, 5 lanes", partial(lanes, count=5), "bf16"),
    "lanes5_tf32": Rung("captured steps, 5 lanes, tf32", partial(lanes, count=5), "tf32"),
    "lanes5_fp32": Rung("captured steps, 5 lanes, fp32", partial(lanes, count=5), "fp32"),
    "generator": Rung("a boundary's steps, eager", generator_eager, "bf16", base="generator"),
    "generator_captured": Rung("a boundary's steps, captured", generator_captured, "bf16", base="generator"),
    "compile": Rung("torch.compile", compiled, "bf16"),
}

POOLS = {"pool": POOL}
"""Images of the pool of those rungs that have one."""
