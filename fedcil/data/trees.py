"""Trees of image files: what is in them, in sorted order, and how a file becomes pixels."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedcil.data.cache import Blocks
from fedcil.data.dataset import Bytes
from fedcil.data.progress import counted
from fedcil.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg")  # in either case
IMAGES_AT_ONCE = 256
MOST_THREADS = 8


@dataclass(frozen=True, slots=True)
class Frame:
    """The shorter side is scaled to ``shorter`` pixels, then the middle ``size`` x ``size`` are cut out."""

    shorter: int
    size: int


def class_folders(folder: Path) -> list[Path]:
    """The folders in ``folder`` by name, hidden ones left out; none where it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def images_in(folder: Path) -> list[Path]:
    """The images directly in ``folder`` by name: the order of a listing depends on the file system."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def decoded(rows: Sequence[tuple[Path, int]], sides: tuple[int, int], frame: Frame | None, label: str | None) -> Blocks:
    """The images of a split, decoded a few hundred at a time when they are written to the cache.

    ``rows`` are files with their class; ``sides`` (height, width) is what each image has after ``frame``;
    ``label`` is for the progress line.
    """
    paths = [path for path, _ in rows]
    classes = np.array([number for _, number in rows], np.int64)
    return Blocks((len(rows), *sides, 3), classes, counted(_decode_all(paths, frame), len(rows), label))


def _decode_all(paths: Sequence[Path], frame: Frame | None) -> Iterator[Bytes]:
    """Pillow lets go of the interpreter lock while it decodes, so threads are enough."""
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        for start in range(0, len(paths), IMAGES_AT_ONCE):
            yield np.stack(list(pool.map(decode, paths[start : start + IMAGES_AT_ONCE], repeat(frame))))


def decode(path: Path, frame: Frame | None) -> Bytes:
    """(height, width, 3) uint8; grey and palette images become RGB. Raises InputError naming the file."""
    from PIL import Image

    with _opened(path) as image:
        pixels = image.convert("RGB")
    if frame is not None:
        pixels = pixels.resize(_scaled(pixels.size, frame), Image.Resampling.BILINEAR)
        left, top = (round((side - frame.size) / 2) for side in pixels.size)
        pixels = pixels.crop((left, top, left + frame.size, top + frame.size))
    return np.array(pixels)


def _scaled(size: tuple[int, int], frame: Frame) -> tuple[int, int]:
    """(width, height) with the shorter side as wanted and the longer rounded down, as torchvision does."""
    short = min(size)
    width, height = (side * frame.shorter // short for side in size)
    return width, height


def size_of(path: Path) -> tuple[int, int]:
    """(height, width) from the file's header. Raises InputError naming the file."""
    with _opened(path) as image:
        return image.height, image.width


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"cannot be read as an image: {error}",
            where=str(path),
            allowed=", ".join(SUFFIXES),
            next="replace or remove the file",
        ) from None
