"""What the rungs of the ladder train: the same clients, networks, orders, crops and latents for each of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as pictures

from client.training import batches, cut_epoch
from fedcil.compute import Compute, Precision
from fedcil.data.augment import PAD, make_batch
from fedcil.fold import Fold
from fedcil.keys import Key
from fedcil.messages import Payload
from fedcil.methods.base import Samples, part
from fedcil.methods.mfcl import MFCL
from fedcil.models import make_architecture
from fedcil.models.network import Network, initialise, snapshot
from fedcil.stream import Task
from fedcil.tables import ModelSection, TrainingSection
from fedcil.tensors import Contribution, Tensors
from scenarios.benchmarks.plain import MEAN, STD
from scenarios.benchmarks.step import KEY, RELEASED, SHAPE, TASK, make_payload

Inputs = tuple[Tensor, Tensor, list[Tensor]]
"""An epoch's augmented images (n, c, h, w), labels (n,), and the draws of each step."""


@dataclass(frozen=True, slots=True)
class Work:
    """A round of MFCL's local training, in one epoch each, and so many steps of the generator."""

    model: str
    width: int
    clients: int
    samples: int
    batch: int
    synthetic: int
    latent: int
    generator_width: int
    generator_steps: int

    @property
    def sizes(self) -> list[int]:
        return cut_epoch(self.samples, self.batch, "ragged")

    @property
    def steps(self) -> int:
        return self.clients * len(self.sizes)


PAPER = Work("resnet18", 64, 5, 100, 32, 128, 1000, 128, 20)  # 5 clients of 100 images: batches of 32, 32, 32 and 4
TINY = Work("resnet8", 4, 3, 10, 4, 8, 8, 4, 2)
EXACT = Work("resnet8", 8, 5, 19, 8, 12, 16, 8, 3)  # for weights in float64


class Material:
    """Everything that a rung is given, on ``device``, in torch's default type."""

    task: Task = TASK

    def __init__(self, work: Work, precision: Precision, device: torch.device, pool: int = 0) -> None:
        self.work, self.device = work, device
        architecture = make_architecture(ModelSection(name=work.model, width=work.width), SHAPE, Key(0))
        self.compute = Compute(architecture, device, precision)
        sizes = {"synthetic": work.synthetic, "latent": work.latent, "generator_width": work.generator_width}
        self.settings = MFCL(**RELEASED | sizes | {"pool": pool})
        self.method = self.settings.build()
        on_cpu = Compute(architecture, torch.device("cpu"), precision)
        self.payload = moved(make_payload(self.settings, on_cpu), device)
        self.prepared = self.method.prepare(self.compute, TASK, self.payload, KEY.at("prepare"))
        drawn = on_cpu.network(TASK.seen)
        initialise(drawn, KEY.at("student").torch())
        self.start = {name: tensor.to(device) for name, tensor in snapshot(drawn).items()}
        self.samples = [self._stored(client) for client in range(work.clients)]
        self.keys = [KEY.at("client", client) for client in range(work.clients)]
        self.training = TrainingSection(epochs=1, batch_size=work.batch)
        self.lr = 2.0**-7  # exact in float32
        self.mean, self.std = (torch.tensor(each, device=device) for each in (MEAN, STD))

    def _stored(self, client: int) -> Samples:
        draws = KEY.at("images", client).numpy()
        images = torch.from_numpy(draws.integers(0, 256, (self.work.samples, 32, 32, 3), dtype=np.uint8))
        labels = torch.from_numpy(draws.integers(TASK.old, TASK.seen, self.work.samples))
        return Samples(images.to(self.device), labels.to(self.device))

    def augment(self, images: Tensor, index: Tensor, draws: torch.Generator) -> Tensor:
        return make_batch(images, index, "crop_flip", draws, self.mean, self.std)

    def epoch(self, client: int) -> Inputs:
        """As the product makes them: whole batches, on the device."""
        place = self.keys[client].at("epoch", 0)
        images, labels = zip(*batches(self.samples[client], self.work.sizes, self.augment, place), strict=True)
        return torch.cat(images), torch.cat(labels), self.latents(place)

    def latents(self, place: Key) -> list[Tensor]:
        sizes = enumerate(self.work.sizes)
        return [self.method.draw(self.prepared, size, TASK, place.at("draw", step)) for step, size in sizes]

    def pictures(self, client: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The same batches image by image with PIL, as papers' programs make them: images, labels, latents."""
        place, samples = self.keys[client].at("epoch", 0), self.samples[client]
        order = torch.randperm(self.work.samples, generator=place.at("order").torch())
        draws, count = place.at("augment").torch(), self.work.samples
        corners = torch.randint(0, 2 * PAD + 1, (2, count, 1), generator=draws)[:, :, 0].T.tolist()
        flips = (torch.rand(count, 1, generator=draws) < 0.5)[:, 0].tolist()
        stored = Pictures(samples.images[order].cpu(), samples.labels[order].cpu(), corners, flips)
        ends = np.cumsum(self.work.sizes)
        runs = [list(range(end - size, end)) for end, size in zip(ends, self.work.sizes, strict=True)]
        for (images, labels), latents in zip(DataLoader(stored, batch_sampler=runs), self.latents(place), strict=True):
            yield images.to(self.device), labels.to(self.device), latents

    def student(self) -> Network:
        """Channels last, in train mode, with room for the start weights."""
        return self.compute.network(TASK.seen).train()

    def mean_of(self, states: Iterable[Tensors]) -> dict[str, Tensor]:
        """The round's new model; states are read one by one, before the next is asked for."""
        fold = Fold.empty(self.work.clients)
        for client, state in enumerate(states):
            fold.add(client, Contribution(state, 1.0))
        total = fold.total()
        assert total is not None
        return total.mean()


class Pictures(Dataset[tuple[Tensor, int]]):
    """PIL images in the order of an epoch, each with its own crop and flip."""

    def __init__(self, images: Tensor, labels: Tensor, corners: list[list[int]], flips: list[bool]) -> None:
        self.images = [Image.fromarray(image.numpy()) for image in images]
        self.labels, self.corners, self.flips = labels.tolist(), corners, flips

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        top, left = self.corners[place]
        image = pictures.crop(pictures.pad(self.images[place], [PAD]), top, left, 32, 32)
        image = pictures.hflip(image) if self.flips[place] else image
        return pictures.normalize(pictures.to_tensor(image), list(MEAN), list(STD)), self.labels[place]


def moved(payload: Payload, device: torch.device) -> Payload:
    return Payload({name: tensor.to(device) for name, tensor in payload.tensors.items()}, payload.hash)


def plain_networks(material: Material) -> tuple[Network, Network, nn.Module]:
    """Student, teacher and generator as a plain program has them: NCHW, nothing folded."""
    compute, payload = material.compute, material.payload
    student, teacher = (compute.architecture.build(count).to(material.device) for count in (TASK.seen, TASK.old))
    teacher.load_state_dict(part("teacher", payload.tensors), strict=False)
    generator = material.settings.make_generator(compute).to(material.device)
    generator.load_state_dict(part("generator", payload.tensors), strict=False)
    return student.train(), teacher.eval(), generator.eval()
