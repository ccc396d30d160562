"""Any tree of PNG or JPEG files: ``train/<class>/`` and ``test/<class>/`` (or ``val/<class>/``)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedcil.data.cache import Draft, cached, fingerprint
from fedcil.data.dataset import Dataset
from fedcil.data.places import missing
from fedcil.data.trees import SUFFIXES, Frame, class_folders, decoded, images_in, size_of
from fedcil.errors import InputError, ScenarioError

if TYPE_CHECKING:
    from fedcil.tables import DataSection

LAYOUT = "train/<class>/*.png|jpg|jpeg and test/<class>/... (or val/<class>/...)"

Files = dict[str, list[Path]]  # by class, classes and files sorted


def load(section: DataSection, root: Path, show_progress: bool) -> Dataset:
    """RGB images, (n, height, width, 3); classes are numbered by the order of their folders' names.

    With ``image_size`` the shorter side is scaled to it and the middle is cut out; without, all images must
    have one size.
    """
    train, test = _splits(section.name, root)
    paths = [path for files in (train, test) for group in files.values() for path in group]
    label = section.name if show_progress else None
    size = section.image_size
    return cached(section.name, fingerprint(paths, size), lambda: _draft(train, test, size, label))


def _splits(name: str, root: Path) -> tuple[Files, Files]:
    test_folder = root / "test" if (root / "test").is_dir() else root / "val"
    train, test = _files(root / "train"), _files(test_folder)
    if not train or not test:
        raise missing(name, [root / "train", root / "test", root / "val"], LAYOUT)
    strange = sorted(test.keys() - train.keys())
    if strange:
        raise InputError(
            f"classes without training images: {', '.join(strange)}",
            where=str(test_folder),
            allowed=", ".join(train),
            next="give the folders of both splits the same names",
        )
    return train, test


def _files(folder: Path) -> Files:
    files = {path.name: images_in(path) for path in class_folders(folder)}
    empty = [name for name, paths in files.items() if not paths]
    if empty:
        raise InputError(
            f"class folders without images: {', '.join(empty)}",
            where=str(folder),
            allowed="files that end in " + ", ".join(SUFFIXES),
            next="add images or remove the folders",
        )
    return files


def _draft(train: Files, test: Files, size: int | None, label: str | None) -> Draft:
    sides = _common_size(train, test) if size is None else (size, size)
    frame = None if size is None else Frame(size, size)
    names = tuple(train)
    return Draft(
        name="folder",
        train=decoded(_rows(train, names), sides, frame, label),
        test=decoded(_rows(test, names), sides, frame, label),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        class_names=names,
        notes=tuple(f"class {name!r} has no test images" for name in names if name not in test),
    )


def _rows(files: Files, names: tuple[str, ...]) -> list[tuple[Path, int]]:
    number = {name: label for label, name in enumerate(names)}
    return [(path, number[name]) for name, paths in files.items() for path in paths]


def _common_size(train: Files, test: Files) -> tuple[int, int]:
    """(height, width) of every image; ScenarioError where they differ."""
    seen: dict[tuple[int, int], Path] = {}
    for files in (train, test):
        for path in (path for paths in files.values() for path in paths):
            seen.setdefault(size_of(path), path)
    if len(seen) > 1:
        examples = [f"{height} x {width} ({path.name})" for (height, width), path in seen.items()]
        raise ScenarioError(
            "the images have different sizes: " + ", ".join(examples[:3]),
            where="data.image_size",
            allowed="a number of pixels, for example 64",
            next="set data.image_size",
        )
    return next(iter(seen))
