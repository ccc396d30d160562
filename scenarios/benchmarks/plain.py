"""FedAvg as a plain PyTorch loop: a deep copy of the model, a DataLoader and an optimiser for each client.

With torch, torchvision and the networks of ``nets.py``. The data of all peers are one file: uint8 ``images`` (clients,
samples, height, width, 3) and int64 ``labels`` (clients, samples).
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import transforms

from scenarios.benchmarks.nets import build

BATCH, RATE = 10, 0.05
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)

Mode = Literal["pictures", "tensors", "exact"]
"""``pictures``: PIL images, cropped, flipped and normalised one by one; ``tensors``: normalised float32 tensors, not
augmented; ``exact``: float64 tensors in the order of the file, for comparing weights."""


class Pictures(Dataset[tuple[Tensor, int]]):
    """PIL images with the usual transforms of CIFAR-100, as papers' scripts have them."""

    def __init__(self, images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> None:
        self.images = [Image.fromarray(image) for image in images]
        self.labels = labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return self.transform(self.images[place]), self.labels[place]


def client_sets(path: Path, mode: Mode) -> list[Dataset[Any]]:
    """One data set per client."""
    file = np.load(path)
    pairs = list(zip(file["images"], file["labels"], strict=True))
    if mode == "pictures":
        return [Pictures(images, labels) for images, labels in pairs]
    return [TensorDataset(normalised(images, mode), torch.from_numpy(labels)) for images, labels in pairs]


def normalised(images: np.ndarray[Any, Any], mode: Mode) -> Tensor:
    dtype = torch.float64 if mode == "exact" else torch.float32
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).to(dtype) / 255
    return (scaled - torch.tensor(MEAN, dtype=dtype).view(3, 1, 1)) / torch.tensor(STD, dtype=dtype).view(3, 1, 1)


def model_of(net: str, mode: Mode) -> nn.Module:
    return build(net).to(torch.float64 if mode == "exact" else torch.float32)


def train(model: nn.Module, samples: Dataset[Any], mode: Mode) -> None:
    """One local epoch."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for images, labels in DataLoader(samples, BATCH, shuffle=mode != "exact"):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


class PlainLoop:
    """A round of FedAvg over clients of equal size."""

    def __init__(self, data: Path, net: str, mode: Mode) -> None:
        self.model, self.clients, self.mode = model_of(net, mode), client_sets(data, mode), mode

    def round(self) -> None:
        states = []
        for samples in self.clients:
            local = deepcopy(self.model)
            train(local, samples, self.mode)
            states.append(local.state_dict())
        mean = {name: torch.stack([s[name].double() for s in states]).mean(0).to(t) for name, t in states[0].items()}
        self.model.load_state_dict(mean)

    def weights(self) -> dict[str, np.ndarray[Any, Any]]:
        """Parameters of the global model by name."""
        return {name: p.detach().numpy() for name, p in self.model.named_parameters()}
