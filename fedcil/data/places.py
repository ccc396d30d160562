"""Where data sets are looked for, and the errors that say where they were not, or could not be read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from fedcil.errors import DataMissing, InputError, reading

if TYPE_CHECKING:
    from fedcil.tables import DataSection

ROOT_VARIABLE = "FEDCIL_DATA_ROOT"
SHOWN = 6  # paths that an error lists before it says how many more there are
HOW = {  # what helps where nothing can be downloaded
    "fashion_mnist": "on Debian `apt-get install dataset-fashion-mnist` brings the four files (put them into "
    "FashionMNIST/raw), elsewhere let torchvision.datasets.FashionMNIST(root, download=True) fetch them",
    "mnist": "fetch them with torchvision.datasets.MNIST(root, download=True)",
    "cifar10": "fetch cifar-10-python.tar.gz with torchvision.datasets.CIFAR10(root, download=True)",
    "cifar100": "fetch cifar-100-python.tar.gz with torchvision.datasets.CIFAR100(root, download=True)",
    "cifar100_coarse": "fetch cifar-100-python.tar.gz with torchvision.datasets.CIFAR100(root, download=True)",
    "tiny_imagenet": "unpack the official tiny-imagenet-200.zip (cs231n.stanford.edu) there",
    "super_imagenet": "point it at an ImageNet tree (image-net.org, by registration) sorted into class folders",
}


def default_root(section: DataSection, root: Path | None) -> Path:
    """The data root: option, then ``data.root``, then $FEDCIL_DATA_ROOT, then the user's cache folder.

    Raises InputError where that is in the home of nobody.
    """
    given = root or section.root or os.environ.get(ROOT_VARIABLE) or "~/.cache/fedcil/data"
    return expanded(given, f"--data-root, data.root in the scenario or ${ROOT_VARIABLE}").absolute()


def expanded(path: str | Path, settings: str) -> Path:
    """``path`` with the home folder that a ``~`` or ``~user`` at its start stands for; ``settings`` say another.

    Raises InputError where there is no such home: an unknown user, or in a container nobody's number and no $HOME.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:  # pathlib's way to say so
        raise InputError(
            f"there is no home folder {Path(path).parts[0]} here",
            where=str(path),
            allowed="a path without ~, or with the ~ of a user who has a home",
            next=f"give another: {settings}",
        ) from None


def reading_data(what: str) -> AbstractContextManager[None]:
    """Raises InputError that names the file, or else ``what``, where one of a data set cannot be read."""
    return reading("a part of the data set", what, "let it be read by you, mend it or take it away")


def missing(name: str, looked: Iterable[Path], layout: str, reason: str = "") -> DataMissing:
    """The error for a set that is not there: what was looked at, what it must look like, what to do."""
    paths = [str(path) for path in looked]
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return DataMissing(
        f"the data set {name!r} is not there" + (f": {reason}" if reason else ""),
        where="looked at " + ", ".join(paths[:SHOWN]) + more,
        allowed=f"a data root that holds {layout}",
        next=(f"{HOW[name]}; then " if name in HOW else "")
        + f"give that folder: --data-root, data.root in the scenario or ${ROOT_VARIABLE} (docs/data.md)",
    )
