"""The released MFCL program as a process here: on one core of a CPU, not a line of it changed.

    python -m scenarios.authors.program DIR DATA_ROOT [the program's own options]

DIR is a clone of SaraBabakN/MFCL-NeurIPS23. It is given the first 12 classes of CIFAR-100 as fedcil reads them, the
narrow ResNet of fedcil instead of its ResNet-18, and fedcil's setting of the memory allocator. 'cuda' means the CPU.
"""

from __future__ import annotations

import runpy
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from fedcil.allocator import keep_freed_memory
from fedcil.data import load_dataset
from fedcil.models.resnet import resnet8
from fedcil.tables import DataSection

CLASSES = 12


def require_program(folder: Path) -> None:
    if not (folder / "clients" / "MFCL.py").is_file():
        raise SystemExit(
            f"error: {folder} has no clients/MFCL.py\n"
            "  next: git clone https://github.com/SaraBabakN/MFCL-NeurIPS23, and name that folder"
        )


def open_program(folder: Path) -> None:
    """Let its modules be imported, and run on a CPU. For a process of its own: torch is changed."""
    require_program(folder)
    sys.path.insert(0, str(folder))
    for name in ("tqdm", "pandas"):  # a progress bar, and lists of ImageNet
        if find_spec(name) is None:
            sys.modules[name] = stand_in(name)
    torch.Tensor.to = on_cpu(torch.Tensor.to)
    nn.Module.to = on_cpu(nn.Module.to)
    torch.ones = on_cpu(torch.ones)
    warnings.filterwarnings("ignore", message="torch.meshgrid")


def stand_in(name: str) -> Any:
    module: Any = ModuleType(name)
    module.tqdm, module.DataFrame = iter, object
    return module


def on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*values: Any, **named: Any) -> Any:
        here = ["cpu" if isinstance(value, str) and value == "cuda" else value for value in values]
        if named.get("device") == "cuda":
            named["device"] = "cpu"
        return function(*here, **named)

    return call


class Pictures:
    """In place of ``torchvision.datasets.CIFAR100``, which would download it."""

    def __init__(self, root: str, train: bool, transform: Callable[[Any], Tensor], **_: bool) -> None:
        data = load_dataset(DataSection(name="cifar100", classes=CLASSES), 0, root=Path(root))
        split = data.train if train else data.test
        self.images, self.targets, self.transform = split.images, split.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[place])), self.targets[place]


class Narrow(nn.Module):
    """fedcil's narrow ResNet as the program takes a network: ``fc`` says how many features it has, and is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.body = resnet8(3, 16, "3x3_stride2")
        self.fc = nn.Linear(self.body.width, 1)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.body(images)
        return features


def main() -> None:
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    folder, root, *options = sys.argv[1:]
    torch.set_num_threads(1)
    keep_freed_memory()
    open_program(Path(folder))
    torchvision.datasets.CIFAR100 = Pictures
    from models import ResNet

    ResNet.ResNet18 = lambda *_, **__: Narrow()
    sys.argv = ["main.py", "--path", root, *options]
    runpy.run_path(f"{folder}/main.py", run_name="__main__")


if __name__ == "__main__":
    main()
