"""Decoded arrays, written once as .npy files and memory-mapped by every process that needs them.

An entry is one folder: the images and labels of both splits and ``meta.json``, which holds the digest and
the size and time of each file. It is written under a temporary name, synced and renamed, by one process at
a time. What cannot be read, or was touched since and no longer has its digest, is built again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock

from fedcil.data.dataset import (
    Bytes,
    Dataset,
    Labels,
    Shape,
    Split,
    digest_of,
    hash_split,
    new_hasher,
)
from fedcil.data.places import expanded, reading_data
from fedcil.errors import InputError
from fedcil.files import sync_file, sync_folder

CACHE_VARIABLE = "FEDCIL_CACHE"
FORMAT = "v1"  # part of the folder's name, so that two versions of fedcil never fight over an entry
SPLITS = ("train", "test")


@dataclass(frozen=True, slots=True)
class Blocks:
    """A split that is yet to be written: its images come in consecutive blocks, never all at once."""

    shape: Shape
    labels: Labels
    blocks: Iterable[Bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """All of a data set but its digest, ready to be written."""

    name: str
    train: Blocks
    test: Blocks
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def cache_root() -> Path:
    """$FEDCIL_CACHE, else a folder in the user's cache. Raises InputError where that is in the home of nobody."""
    given = os.environ.get(CACHE_VARIABLE) or "~/.cache/fedcil/arrays"
    return expanded(given, f"${CACHE_VARIABLE}, a folder that you may write to").absolute()


def fingerprint(paths: Iterable[Path], *options: object) -> str:
    """Changes when one of ``paths`` moves, is replaced or edited, or when ``options`` (by repr) differ.

    A folder stands for the names in it, not for the contents of its files.
    """
    hasher = blake2b(repr(options).encode(), digest_size=12)
    for path in paths:
        stat = path.stat()
        hasher.update(os.fsencode(path) + f"|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    return hasher.hexdigest()


def cached(name: str, source: str, prepare: Callable[[], Draft]) -> Dataset:
    """The entry ``name`` for the fingerprint ``source``; ``prepare`` is called only where it must be written.

    Images are mapped copy-on-write: writing to them changes no file and no other process.
    Raises InputError where the cache folder cannot be written, or a file that ``prepare`` reads cannot be read.
    """
    folder = cache_root() / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}-{FORMAT}-{source}"
    found = _open(folder)
    return found if found is not None else _build(folder, prepare)


def _open(folder: Path) -> Dataset | None:
    """The entry, or None where it is not there or not whole."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        data = _dataset(folder, meta)
        touched = _stamps(folder) != meta["files"]
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    # Only a file whose size or time changed since it was written is worth reading in full.
    return None if touched and digest_of(data.train, data.test) != data.digest else data


def _dataset(folder: Path, meta: dict[str, Any]) -> Dataset:
    train, test = (_read_split(folder, split) for split in SPLITS)
    return Dataset(
        name=meta["name"],
        train=train,
        test=test,
        mean=tuple(meta["mean"]),
        std=tuple(meta["std"]),
        class_names=tuple(meta["class_names"]),
        digest=meta["digest"],
        notes=tuple(meta["notes"]),
    )


def _read_split(folder: Path, split: str) -> Split:
    images = np.asarray(np.load(folder / f"{split}-images.npy", mmap_mode="c"))
    labels = np.load(folder / f"{split}-labels.npy")
    if images.dtype != np.uint8 or images.ndim != 4 or labels.dtype != np.int64 or len(images) != len(labels):
        raise ValueError(f"{folder}: not the arrays of a data set")
    return Split(images, labels)


def _stamps(folder: Path) -> dict[str, list[int]]:
    """Size and time of every array file."""
    stats = {path.name: path.stat() for path in sorted(folder.glob("*.npy"))}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _build(folder: Path, prepare: Callable[[], Draft]) -> Dataset:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            found = _open(folder)  # another process may have been quicker
            if found is None:
                with reading_data(folder.name):  # what its source does is no fault of the cache
                    draft = prepare()
                _write(folder, draft)
                found = _open(folder)
    except OSError as error:
        raise _unwritable(folder, error.strerror or str(error)) from None
    if found is None:
        raise _unwritable(folder, "what was written cannot be read back")
    return found


def _unwritable(folder: Path, reason: str) -> InputError:
    return InputError(
        f"the array cache cannot be written: {reason}",
        where=str(folder),
        next=f"set ${CACHE_VARIABLE} to a folder that you may write to and that has room",
    )


def _write(folder: Path, draft: Draft) -> None:
    with _scratch(folder) as scratch:
        hasher = new_hasher()
        for split, blocks in zip(SPLITS, (draft.train, draft.test), strict=True):
            _write_split(scratch, split, blocks, hasher)
        _write_meta(scratch, draft, hasher.hexdigest())
        sync_folder(scratch)
        _swap(scratch, folder)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """An empty folder beside ``folder``, gone afterwards; one that a killed process left is emptied first."""
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_split(scratch: Path, split: str, blocks: Blocks, hasher: blake2b) -> None:
    with (scratch / f"{split}-images.npy").open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": tuple(int(side) for side in blocks.shape)}
        np.lib.format.write_array_header_1_0(file, header)
        hash_split(hasher, blocks.shape, _written(file, blocks.blocks), blocks.labels)
        sync_file(file)
    with (scratch / f"{split}-labels.npy").open("wb") as file:
        np.save(file, np.asarray(blocks.labels, dtype="<i8"))
        sync_file(file)


def _written(file: BinaryIO, blocks: Iterable[Bytes]) -> Iterator[Bytes]:
    """Pass the blocks on to the hash after writing each: one pass over the data does both."""
    for block in blocks:
        contiguous = np.ascontiguousarray(block)
        file.write(contiguous.data)
        yield contiguous


def _write_meta(scratch: Path, draft: Draft, digest: str) -> None:
    meta = {
        "name": draft.name,
        "mean": draft.mean,
        "std": draft.std,
        "class_names": draft.class_names,
        "notes": draft.notes,
        "digest": digest,
        "files": _stamps(scratch),
    }
    with (scratch / "meta.json").open("wb") as file:
        file.write(json.dumps(meta, indent=1).encode())
        sync_file(file)


def _swap(scratch: Path, folder: Path) -> None:
    """Put the new entry in place; a damaged one goes first, and whoever has it mapped keeps it."""
    if folder.exists():
        old = folder.with_name(f".{folder.name}.damaged")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    scratch.rename(folder)
    sync_folder(folder.parent)
