"""Data sets as uint8 arrays, and the one function that loads them.

The table names every shipped loader; a module is imported when its set is asked for. A loader gives the
full set; what ``[data]`` says about classes, hold-out, samples and size is applied here, the same for all.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from fedcil.data.dataset import Dataset, Split, digest_of
from fedcil.data.places import default_root, reading_data

if TYPE_CHECKING:
    from fedcil.tables import DataSection

__all__ = ["LOADERS", "Dataset", "Split", "default_root", "digest_of", "load_dataset"]

# Modules whose load(section, root, show_progress) gives the full set.
LOADERS = {
    "digits": "fedcil.data.digits",
    "mnist": "fedcil.data.mnist",
    "fashion_mnist": "fedcil.data.mnist",
    "cifar10": "fedcil.data.cifar",
    "cifar100": "fedcil.data.cifar",
    "cifar100_coarse": "fedcil.data.cifar",
    "tiny_imagenet": "fedcil.data.tiny_imagenet",
    "super_imagenet": "fedcil.data.super_imagenet",
    "folder": "fedcil.data.folders",
    "synthetic": "fedcil.data.synthetic",
}
ROOTLESS = ("digits", "synthetic")  # look for no file below the data root, so that none need be there


def load_dataset(section: DataSection, seed: int, *, root: Path | None = None, show_progress: bool = False) -> Dataset:
    """The data set that ``[data]`` describes.

    ``seed`` decides ``samples_per_class`` and nothing else: the classes, the hold-out and the images of a
    set are the same in every run. ``root`` is the ``--data-root`` option; ``show_progress`` prints how far
    the decoding is (stderr). Raises DataMissing, ScenarioError or InputError; nothing is left half done.
    """
    from fedcil.data.resize import resized
    from fedcil.data.select import select

    full = _load(section, root, show_progress)
    # A drawn set has as many images as were asked for; drawing among them again would ask for too many.
    per_class = None if section.name == "synthetic" else section.samples_per_class
    # Size and choice of images commute; sizing the full set first lets all runs share one cached copy.
    return select(
        resized(full, section.image_size),
        classes=section.classes,
        validation=section.validation,
        per_class=per_class,
        seed=seed,
    )


def _load(section: DataSection, root: Path | None, show_progress: bool) -> Dataset:
    """The full set, from the table or from a person's own function."""
    place = Path() if section.name in ROOTLESS else default_root(section, root)
    if ":" in section.name:
        from fedcil.data.own import load_own

        return load_own(section, place)
    loader = import_module(LOADERS[section.name])
    with reading_data(str(place)):
        loaded: Dataset = loader.load(section, place, show_progress)
    return loaded
