"""The released program's own steps against fedcil's, in float64: from the same numbers to the same numbers.

    python -m scenarios.authors.steps DIR

DIR is a clone of SaraBabakN/MFCL-NeurIPS23. Its ResNet-18 and its generator, 20 old classes and 10 new ones: a client
trains on batches of 8, 8, 8 and 4 images, each with 32 synthetic ones; the server makes four steps of 48 images.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from client.training import LocalSGD, Recipe
from fedcil.compute import Compute
from fedcil.keys import Key
from fedcil.methods.adam import Adam
from fedcil.methods.inversion import generator_loss
from fedcil.methods.mfcl import MFCL
from fedcil.methods.replay import Replay
from fedcil.models import make_architecture
from fedcil.models.network import Network, set_norm_updates, snapshot, trained_parameters
from fedcil.stream import Task
from fedcil.tables import ModelSection, TrainingSection
from scenarios.authors.program import open_program

TASK = Task(1, 20, 30)
REAL, SYNTHETIC, LATENT, BATCH = (8, 8, 8, 4), 32, 64, 48
LR = 0.05
SETTINGS = MFCL(**MFCL.presets["authors-code"] | {"synthetic": SYNTHETIC, "latent": LATENT})


class Fed(nn.Module):
    """A generator of the program that is given its latents instead of drawing them."""

    def __init__(self, generator: nn.Module, latents: Sequence[Tensor]) -> None:
        super().__init__()
        self.generator, self.latents = deepcopy(generator), list(latents)

    def sample(self, *_: Any) -> Tensor:
        images: Tensor = self.generator(self.latents.pop(0))
        return images


def client_step(classifier: Any, generator: nn.Module) -> tuple[float, float]:
    """How far the two models are from each other after local training, and from where they began."""
    from clients.MFCL import MFCL_client

    student = deepcopy(classifier)
    student.Incremental_learning(TASK.seen)
    batches = [(torch.randn(n, 3, 32, 32), torch.randint(TASK.old, TASK.seen, (n,))) for n in REAL]
    latents = [torch.randn(SYNTHETIC, LATENT) for _ in batches]
    start, ours = deepcopy(student), train_ours(student, classifier, generator, batches, latents)

    theirs = MFCL_client(0, 1, [], [], SETTINGS.w_kd, SETTINGS.w_ft, SYNTHETIC, "CIFAR100")
    theirs.train_loader, theirs.last_valid_dim, theirs.valid_dim = batches, TASK.old, TASK.seen
    teacher = teacher_of_the_program(deepcopy(classifier), Fed(generator, latents), TASK.old)
    theirs.train(student, LR, (teacher, deepcopy(classifier.fc)), None, 0)
    apart, moved = (
        max(relative(there, here) for there, here in zip(tensors(other), tensors(student), strict=True))
        for other in (ours, start)
    )
    return apart, moved


def train_ours(
    student: nn.Module,
    classifier: nn.Module,
    generator: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    latents: Sequence[Tensor],
) -> Network:
    """``local_sgd`` on batches that are there already."""
    compute = resnet18()
    model = filled(compute.network(TASK.seen), student).train()
    teacher = compute.teacher(snapshot(filled(compute.architecture.build(TASK.old), classifier)))
    replay = Replay(teacher, filled(SETTINGS.make_generator(compute), generator).eval(), None)
    training = TrainingSection(lr=LR)
    recipe = Recipe(SETTINGS.build(), replay, TASK, training, LR, lambda images, *_: images)
    optimizer = LocalSGD(trained_parameters(model), LR, training)
    set_norm_updates(model, recipe.norm_updates)
    for (images, labels), draws in zip(batches, latents, strict=True):
        optimizer.step(recipe.loss(model, images, labels, draws))
    return model


def generator_step(classifier: nn.Module, generator: nn.Module) -> tuple[float, float]:
    """How far the images of the two generators are from each other after training, in train and in eval mode.

    Images and not weights: a norm takes away the biases before it, so their gradient is rounding, and Adam makes whole
    steps of it. The norm's running mean follows such a bias with a lag: hence the larger difference in eval mode.
    """
    compute, latents = resnet18(), [torch.randn(BATCH, LATENT) for _ in REAL]
    frozen = compute.frozen(snapshot(filled(compute.architecture.build(TASK.old), classifier)))
    ours = SETTINGS.place(filled(SETTINGS.make_generator(compute), generator), compute).train()
    optimizer, weights = Adam(ours.parameters(), SETTINGS.generator_lr), SETTINGS.loss_weights()
    for draws in latents:
        loss, _ = generator_loss(frozen, ours(draws), weights)
        optimizer.step(loss)

    theirs = Fed(generator, latents)
    teacher_of_the_program(deepcopy(classifier), theirs, TASK.old).get_images(bs=BATCH, epochs=len(latents))
    fresh = torch.randn(BATCH, LATENT)
    with torch.no_grad():
        train, fixed = (
            relative(theirs.generator.train(mode)(fresh), ours.train(mode)(fresh)) for mode in (True, False)
        )
    return train, fixed


def teacher_of_the_program(classifier: nn.Module, generator: nn.Module, old: int) -> Any:
    """As its ``train_gen`` makes one."""
    from clients.helper import Teacher

    options = SimpleNamespace(bn_loss=1, noise=1, ie_loss=1, act_loss=0, w_ie=SETTINGS.w_ie, w_act=0.0)
    weights = [0.0, SETTINGS.w_bn, SETTINGS.w_prior, SETTINGS.temperature, 1]
    optimizer = torch.optim.Adam(generator.parameters(), SETTINGS.generator_lr)
    teacher = Teacher(classifier, generator, optimizer, None, 0, np.arange(old), weights, False, options)
    teacher.smoothing.to(torch.get_default_dtype())
    return teacher


def resnet18() -> Compute:
    architecture = make_architecture(ModelSection(name="resnet18"), (3, 32, 32), Key(0))
    return Compute(architecture, torch.device("cpu"), "fp32")  # torch's default type, here float64


def tensors(module: nn.Module) -> Iterator[Tensor]:
    """Its state without counters, and without the head of the program's feature extractor, which is not used."""
    for name, tensor in module.state_dict().items():
        if not name.endswith("num_batches_tracked") and not name.startswith("feature.fc."):
            yield tensor


def filled(target: Any, source: nn.Module) -> Any:
    """``target`` with the source's numbers: both have the same layers in the same order."""
    with torch.no_grad():
        for here, there in zip(tensors(target), tensors(source), strict=True):
            here.copy_(there)
    return target


def relative(there: Tensor, here: Tensor) -> float:
    """The largest difference over the largest number."""
    return ((there - here).abs().max() / here.abs().max()).item()


def main() -> int:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    open_program(Path(sys.argv[1]))
    from models.generator import CIFAR_GEN
    from models.myNetwork import network
    from models.ResNet import ResNet18

    classifier, generator = network(TASK.old, ResNet18(100, cifar=True)), CIFAR_GEN(zdim=LATENT)
    with torch.no_grad():  # running statistics that are not those of a new network
        classifier.train()(torch.randn(64, 3, 32, 32))
        generator.train()(torch.randn(64, LATENT))
    print("largest difference over the largest number, float64")
    apart, moved = client_step(classifier, generator)
    print(f"a client's model after {len(REAL)} steps: {apart:.1e} (from where it began: {moved:.1e})")
    train, fixed = generator_step(classifier, generator)
    print(f"a generator's images after {len(REAL)} steps: {train:.1e} in train mode, {fixed:.1e} in eval mode")
    return 0


if __name__ == "__main__":
    sys.exit(main())
