"""Published sets: the files as they are, or downloaded through torchvision where the network allows it."""

from __future__ import annotations

from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from tarfile import TarError
from urllib.request import urlopen

from filelock import FileLock

from fedcil.data.places import missing

SECONDS_TO_ANSWER = 10.0


def obtain(name: str, root: Path, files: Sequence[Path], layout: str, torchvision_name: str) -> None:
    """Return once all ``files`` are there; raise DataMissing where they are not and cannot be got."""
    absent = [file for file in files if not file.is_file()]
    if not absent:
        return
    try:
        refuse_silence(torchvision_name)
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{torchvision_name}.lock"):
            if not all(file.is_file() for file in files):
                download(torchvision_name, root)
    except (OSError, HTTPException, TarError, RuntimeError) as error:
        raise missing(name, absent, layout, f"download failed ({error})") from None
    absent = [file for file in files if not file.is_file()]
    if absent:
        raise missing(name, absent, layout, "the download did not bring it")


def download(torchvision_name: str, root: Path) -> None:
    """Let torchvision download, check and unpack its set of that name into ``root``."""
    from torchvision import datasets

    getattr(datasets, torchvision_name)(root, download=True)


def refuse_silence(torchvision_name: str) -> None:
    """OSError if the server of that set does not answer: torchvision would wait for it without limit."""
    from torchvision import datasets

    kind = getattr(datasets, torchvision_name)
    address = kind.mirrors[0] + kind.resources[0][0] if hasattr(kind, "mirrors") else kind.url
    with urlopen(str(address), timeout=SECONDS_TO_ANSWER):
        pass
