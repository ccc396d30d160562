"""TinyImageNet in its official layout: 200 classes, 64 x 64 pixels, 500 training images of each.

Its test split has no labels, so its validation split (50 of each) is measured on. Classes are numbered by their sorted
wnids, not as in ``wnids.txt``: so does torchvision's ImageFolder, and with it the code of MFCL (arXiv 2311.07784).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedcil.data.cache import Draft, cached, fingerprint
from fedcil.data.dataset import Dataset
from fedcil.data.places import missing
from fedcil.data.trees import Frame, decoded, images_in
from fedcil.errors import InputError

if TYPE_CHECKING:
    from fedcil.tables import DataSection

ARCHIVE = "tiny-imagenet-200"
SIZE = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
LAYOUT = (
    f"{ARCHIVE}/ with wnids.txt, train/<wnid>/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt"
    " (the official archive, unpacked)"
)


def load(section: DataSection, root: Path, show_progress: bool) -> Dataset:
    """Up to 100,000 training and 10,000 test images, (n, 64, 64, 3)."""
    folder = _find(root)
    wnids = sorted(_lines(folder / "wnids.txt"))
    sources = [folder / "wnids.txt", folder / "val/val_annotations.txt", folder / "val/images"]
    sources += [folder / "train" / wnid / "images" for wnid in wnids]
    absent = [path for path in sources if not path.exists()]
    if absent:
        raise missing(section.name, absent, LAYOUT)
    label = section.name if show_progress else None
    return cached(section.name, fingerprint(sources), lambda: _draft(folder, wnids, label))


def _find(root: Path) -> Path:
    """The archive's folder inside the data root, or the data root itself."""
    places = (root / ARCHIVE, root)
    for place in places:
        if (place / "wnids.txt").is_file():
            return place
    raise missing("tiny_imagenet", [place / "wnids.txt" for place in places], LAYOUT)


def _draft(folder: Path, wnids: list[str], label: str | None) -> Draft:
    sides, frame = (SIZE, SIZE), Frame(SIZE, SIZE)
    return Draft(
        name="tiny_imagenet",
        train=decoded(_train(folder, wnids), sides, frame, label),
        test=decoded(_val(folder, wnids), sides, frame, label),
        mean=MEAN,
        std=STD,
        class_names=_names(folder, wnids),
        notes=("TinyImageNet's test split has no labels: its validation split is the test split here",),
    )


def _train(folder: Path, wnids: list[str]) -> list[tuple[Path, int]]:
    groups = [images_in(folder / "train" / wnid / "images") for wnid in wnids]
    return [(path, label) for label, paths in enumerate(groups) for path in paths]


def _val(folder: Path, wnids: list[str]) -> list[tuple[Path, int]]:
    number = {wnid: label for label, wnid in enumerate(wnids)}
    return [(folder / "val/images" / file, number[wnid]) for file, wnid in _annotations(folder, number)]


def _annotations(folder: Path, known: dict[str, int]) -> list[tuple[str, str]]:
    """(file name, wnid) of each validation image; the box after them is not used."""
    path = folder / "val/val_annotations.txt"
    rows = [line.split("\t")[:2] for line in _lines(path)]
    for number, row in enumerate(rows, 1):
        if len(row) < 2 or row[1] not in known:
            raise InputError(
                f"line {number} names no class of wnids.txt",
                where=str(path),
                allowed="file name, tab, wnid, ...",
                next="unpack the official archive again",
            )
    return [(file, wnid) for file, wnid in rows]


def _names(folder: Path, wnids: list[str]) -> tuple[str, ...]:
    """The first word of each class in words.txt where there is one, else the wnid."""
    path = folder / "words.txt"
    rows = [line.partition("\t") for line in _lines(path)] if path.is_file() else []
    words = {wnid: text.split(",")[0] for wnid, _, text in rows}
    return tuple(words.get(wnid, wnid) for wnid in wnids)


def _lines(path: Path) -> list[str]:
    """Lines that are not empty."""
    try:
        return [line.rstrip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot be read: {error}", where=str(path), next="unpack the official archive again"
        ) from None
