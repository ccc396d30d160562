"""SuperImageNet (MFCL, arXiv 2307.00497): ImageNet classes grouped into 50, 75 or 100 super-classes.

Built from a local ImageNet tree and a mapping file that the user gives; the grouping itself is not shipped.
A super-class that has too few images is kept and reported in the notes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcil.data.cache import Blocks, Draft, cached, fingerprint
from fedcil.data.dataset import Dataset
from fedcil.data.places import expanded, missing
from fedcil.data.trees import Frame, decoded, images_in
from fedcil.errors import InputError
from fedcil.keys import Key

if TYPE_CHECKING:
    from fedcil.tables import DataSection

SIZE = 224  # pixels, where the scenario does not say
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAYOUT = "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG (ImageNet, the validation images sorted into folders too)"
FORM = "index: [name, {wnid: class name, ...}] for each super-class"


@dataclass(frozen=True, slots=True)
class Version:
    """Which super-classes belong to a version, and how many images of each are used."""

    members: int  # at least as many ImageNet classes
    train: int
    test: int


VERSIONS = {"s": Version(2, 2500, 100), "m": Version(4, 5000, 200), "l": Version(6, 7500, 300)}


@dataclass(frozen=True, slots=True)
class SuperClass:
    index: int  # in the mapping file
    name: str
    wnids: tuple[str, ...]


def load(section: DataSection, root: Path, show_progress: bool) -> Dataset:
    """RGB images, (n, size, size, 3); classes are numbered by the order of their indices in the mapping.

    The shorter side is scaled to 8/7 of the size and the middle is cut out, in both splits (256 and 224: the
    authors' test transform).
    """
    assert section.mapping is not None  # the table has seen to it
    path, version = expanded(section.mapping, "data.mapping"), VERSIONS[section.version]
    size = section.image_size or SIZE
    chosen = _of_version(read_mapping(path), version, path)
    folder = _find(root)
    folders = [folder / split / wnid for split in ("train", "val") for kind in chosen for wnid in kind.wnids]
    absent = [place for place in folders if not place.is_dir()]
    if absent:
        raise missing(section.name, absent, LAYOUT, f"{len(absent)} class folders of the mapping are missing")
    mapping = blake2b(repr(chosen).encode(), digest_size=16).hexdigest()
    source = fingerprint(folders, mapping, version, size)
    label = section.name if show_progress else None
    return cached(section.name, source, lambda: _draft(folder, chosen, version, size, label))


def _find(root: Path) -> Path:
    places = (root / "imagenet", root)
    for place in places:
        if (place / "train").is_dir() and (place / "val").is_dir():
            return place
    looked = [place / split for place in places for split in ("train", "val")]
    raise missing("super_imagenet", looked, LAYOUT)


def read_mapping(path: Path) -> tuple[SuperClass, ...]:
    """All super-classes of a mapping file, by index. Raises InputError that names the entry."""
    table = _parse(path)
    if not isinstance(table, dict) or not table:
        raise _bad_mapping(path, "it is no table of super-classes")
    kinds = sorted((_entry(path, key, value) for key, value in table.items()), key=lambda kind: kind.index)
    owners: dict[str, str] = {}
    for kind in kinds:
        for wnid in kind.wnids:
            if owners.setdefault(wnid, kind.name) != kind.name:
                raise _bad_mapping(path, f"{wnid} is in both {owners[wnid]!r} and {kind.name!r}")
    return tuple(kinds)


def _parse(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else _parse_yaml(path, text)
    except (OSError, ValueError) as error:
        raise _bad_mapping(path, str(error)) from None


def _parse_yaml(path: Path, text: str) -> Any:
    import yaml  # of one data set alone

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _bad_mapping(path, str(error)) from None


def _entry(path: Path, key: object, value: object) -> SuperClass:
    """One ``index: [name, {wnid: class name}, ...]``; the members may be cut into several tables."""
    if not str(key).isdecimal():
        raise _bad_mapping(path, f"{key!r} is not an index")
    parts: list[Any] = value if isinstance(value, list) else []
    name, tables = parts[:1], parts[1:]
    if not (name and isinstance(name[0], str) and tables and all(isinstance(table, dict) for table in tables)):
        raise _bad_mapping(path, f"entry {key} is not [name, {{wnid: class name}}]")
    wnids = sorted(str(wnid) for table in tables for wnid in table)
    return SuperClass(int(str(key)), name[0], tuple(wnids))


def _bad_mapping(path: Path, reason: str) -> InputError:
    return InputError(f"the mapping cannot be used: {reason}", where=str(path), allowed=FORM)


def _of_version(kinds: tuple[SuperClass, ...], version: Version, path: Path) -> tuple[SuperClass, ...]:
    chosen = tuple(kind for kind in kinds if len(kind.wnids) >= version.members)
    if not chosen:
        raise _bad_mapping(path, f"no super-class has {version.members} members, as this version needs")
    return chosen


def _draft(folder: Path, chosen: tuple[SuperClass, ...], version: Version, size: int, label: str | None) -> Draft:
    train = [_images(folder / "train", kind, version.train) for kind in chosen]
    test = [_images(folder / "val", kind, version.test) for kind in chosen]
    short = _shortfalls("train", chosen, train, version.train)
    return Draft(
        name="super_imagenet",
        train=_blocks(train, size, label),
        test=_blocks(test, size, label),
        mean=MEAN,
        std=STD,
        class_names=tuple(kind.name for kind in chosen),
        notes=short + _shortfalls("val", chosen, test, version.test),
    )


def _images(folder: Path, kind: SuperClass, count: int) -> list[Path]:
    """``count`` images of all members: sorted listing, fixed shuffle, the first ones."""
    paths = [path for wnid in kind.wnids for path in images_in(folder / wnid)]
    if not paths:
        raise InputError(
            f"super-class {kind.name!r} has no images",
            where=", ".join(str(folder / wnid) for wnid in kind.wnids),
            next="unpack the images of these classes",
        )
    order = Key(0).at("super_imagenet", folder.name, kind.index).numpy().permutation(len(paths))
    return [paths[place] for place in order[:count]]


def _shortfalls(split: str, chosen: tuple[SuperClass, ...], images: list[list[Path]], wanted: int) -> tuple[str, ...]:
    return tuple(
        f"{split}: super-class {kind.name!r} has {len(paths)} of {wanted} images"
        for kind, paths in zip(chosen, images, strict=True)
        if len(paths) < wanted
    )


def _blocks(groups: list[list[Path]], size: int, label: str | None) -> Blocks:
    rows = [(path, number) for number, paths in enumerate(groups) for path in paths]
    return decoded(rows, (size, size), Frame(round(size * 8 / 7), size), label)
