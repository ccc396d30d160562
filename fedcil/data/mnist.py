"""MNIST (LeCun et al. 1998) and FashionMNIST (arXiv 1708.07747): four idx files each, plain or gzipped."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedcil.data.cache import Blocks, Draft, cached, fingerprint
from fedcil.data.dataset import Bytes, Dataset
from fedcil.data.download import obtain
from fedcil.errors import InputError

if TYPE_CHECKING:
    from fedcil.tables import DataSection

FILES = tuple(f"{split}-{part}-ubyte" for split in ("train", "t10k") for part in ("images-idx3", "labels-idx1"))


@dataclass(frozen=True, slots=True)
class Kind:
    torchvision_name: str  # also the folder's
    mean: float
    std: float
    class_names: tuple[str, ...]


KINDS = {
    "mnist": Kind("MNIST", 0.1307, 0.3081, tuple(str(digit) for digit in range(10))),
    "fashion_mnist": Kind(
        "FashionMNIST",
        0.2860,
        0.3530,
        (
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
    ),
}


def load(section: DataSection, root: Path, show_progress: bool) -> Dataset:  # noqa: ARG001
    """60,000 training and 10,000 test images, (n, 28, 28, 1), in the order of the files."""
    kind = KINDS[section.name]
    folder = root / kind.torchvision_name / "raw"
    layout = f"{kind.torchvision_name}/raw/ with {', '.join(FILES)} (plain or .gz)"
    files = [_present(folder / name) for name in FILES]
    obtain(section.name, root, files, layout, kind.torchvision_name)
    return cached(section.name, fingerprint(files), lambda: _draft(section.name, kind, files))


def _present(path: Path) -> Path:
    """The plain file, or the gzipped one where only that is there."""
    packed = path.with_name(f"{path.name}.gz")
    return packed if packed.is_file() and not path.is_file() else path


def _draft(name: str, kind: Kind, files: list[Path]) -> Draft:
    train, test = files[:2], files[2:]  # as FILES has them: images, labels
    return Draft(
        name=name,
        train=_blocks(*train),
        test=_blocks(*test),
        mean=(kind.mean,),
        std=(kind.std,),
        class_names=kind.class_names,
    )


def _blocks(image_file: Path, label_file: Path) -> Blocks:
    images, labels = read_idx(image_file), read_idx(label_file)
    count, height, width = images.shape
    if len(labels) != count:
        raise _damaged(label_file, f"it has {len(labels)} labels for {count} images")
    return Blocks((count, height, width, 1), labels.astype(np.int64), [images])


def read_idx(path: Path) -> Bytes:
    """The array of bytes in an idx file: a magic number, one 4-byte size per axis, then the bytes.

    Raises InputError where header and length do not agree.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, str(error)) from None
    axes = 1 if "idx1" in path.name else 3
    start = 4 + 4 * axes
    if raw[:4] != bytes((0, 0, 8, axes)) or len(raw) < start:
        raise _damaged(path, f"it does not begin as an idx file of {axes} axes")
    shape = np.frombuffer(raw[4:start], ">u4").astype(int)
    if len(raw) != start + shape.prod():
        raise _damaged(path, f"it has {len(raw)} bytes, its header promises {start + shape.prod()}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(
        f"cannot be read as an idx file: {reason}",
        where=str(path),
        next="delete it and unpack or download it again",
    )
