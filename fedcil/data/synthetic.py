"""A set that is drawn, for tests and for trying things out: one Gaussian cloud of grey images per class."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedcil.data.dataset import Dataset, Split, digest_of
from fedcil.keys import Key

if TYPE_CHECKING:
    from fedcil.tables import DataSection

CLASSES, PER_CLASS, SIZE = 10, 100, 8  # where the scenario does not say
PIECE = 4096  # images
GREY, NOISE = 128.0, 32.0  # mean and standard deviation of a pixel, in grey levels

Centres = NDArray[np.float64]


def load(section: DataSection, root: Path, show_progress: bool) -> Dataset:  # noqa: ARG001
    """``samples_per_class`` training and ``test_per_class`` test images of each class, (n, size, size, 1).

    A pixel is 128 + 32 (centre of the class + standard normal noise), cut off at 0 and 255. The centres are
    ``separation`` apart. All is drawn from fixed keys: the run's seed changes nothing.
    """
    classes, size = section.classes or CLASSES, section.image_size or SIZE
    centres = _centres(classes, size, section.separation)
    train = _draw("train", centres, section.samples_per_class or PER_CLASS)
    test = _draw("test", centres, section.test_per_class)
    return Dataset(
        name="synthetic",
        train=train,
        test=test,
        mean=(0.5,),
        std=(0.5,),
        class_names=tuple(f"blob {label}" for label in range(classes)),
        digest=digest_of(train, test),
    )


def _centres(classes: int, size: int, separation: float) -> Centres:
    """(classes, size, size): smooth patterns, pairwise ``separation`` apart, in units of the noise.

    Orthogonal patterns of length separation / sqrt(2) are exactly that far apart. More classes than pixels
    cannot be orthogonal; they are then as far apart on average only.
    """
    shape = (classes, size, size)
    white = np.stack([_draws("centre", label).standard_normal((size, size)) for label in range(classes)])
    flat = _smooth(white).reshape(classes, -1)
    if classes <= size * size:
        flat = np.linalg.qr(flat.T)[0].T
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    centres: Centres = (unit * separation / np.sqrt(2)).reshape(shape)
    return centres


def _smooth(patterns: Centres) -> Centres:
    """Mean over 3 x 3 pixels, round the edges: neighbours agree, as in real images."""
    shifts = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    means: Centres = np.mean([np.roll(patterns, shift, axis=(1, 2)) for shift in shifts], axis=0)
    return means


def _draw(split: str, centres: Centres, count: int) -> Split:
    """``count`` images of each class, class after class; a piece at a time is in float64."""
    pixels = np.empty((len(centres), count, *centres.shape[1:], 1), dtype=np.uint8)
    for label, centre in enumerate(centres):
        draws = _draws(split, label)
        for start in range(0, count, PIECE):
            piece = pixels[label, start : start + PIECE, ..., 0]
            grey = GREY + NOISE * (centre + draws.standard_normal(piece.shape))
            piece[:] = np.clip(np.rint(grey), 0, 255)
    return Split(pixels.reshape(-1, *pixels.shape[2:]), np.repeat(np.arange(len(centres), dtype=np.int64), count))


def _draws(place: str, label: int) -> np.random.Generator:
    return Key(0).at("synthetic", place, label).numpy()
