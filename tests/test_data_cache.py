"""The array cache: what comes back, what is damaged, several processes, errors of the file system."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import assert_same, assert_well_formed

from fedcil.data import cache as cache_module
from fedcil.data import digest_of
from fedcil.data.cache import Blocks, Draft, cached, fingerprint
from fedcil.errors import InputError

pytestmark = pytest.mark.usefixtures("array_cache")


def draft(value: int = 1) -> Draft:
    images = np.full((5, 4, 4, 3), value, np.uint8)
    labels = np.arange(5, dtype=np.int64)
    return Draft(
        name="made",
        train=Blocks((5, 4, 4, 3), labels, [images[:2], images[2:]]),
        test=Blocks((5, 4, 4, 3), labels, iter([images])),
        mean=(0.1, 0.2, 1 / 3),
        std=(0.4, 0.5, 0.6),
        class_names=tuple("abcde"),
        notes=("a note",),
    )


def never() -> Draft:
    raise AssertionError("it was in the cache")


def test_cache_gives_back_what_was_written(array_cache: Path) -> None:
    first, second = cached("made", "x", draft), cached("made", "x", never)
    assert_same(first, second)
    assert_well_formed(second)
    assert second.digest == digest_of(second.train, second.test)
    assert (second.mean, second.notes, second.class_names) == (draft().mean, ("a note",), tuple("abcde"))
    assert sorted(path.name for path in array_cache.iterdir()) == ["made-v1-x", "made-v1-x.lock"]
    assert cached("made", "y", lambda: draft(2)).digest != first.digest


def test_mapped_arrays_go_to_torch_without_warning_or_writing_through() -> None:
    data = cached("made", "x", draft)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bank = torch.from_numpy(data.train.images)
    bank.zero_()
    assert cached("made", "x", never).train.images.min() == 1


def cut_short(entry: Path) -> None:
    path = entry / "train-images.npy"
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(entry: Path) -> None:
    path = entry / "test-images.npy"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def lose_labels(entry: Path) -> None:
    (entry / "test-labels.npy").unlink()


def lose_meta(entry: Path) -> None:
    (entry / "meta.json").unlink()


def break_meta(entry: Path) -> None:
    (entry / "meta.json").write_text('{"name": "made"')


def empty_meta(entry: Path) -> None:
    (entry / "meta.json").write_text("{}")


def swap_type(entry: Path) -> None:
    np.save(entry / "train-images.npy", np.zeros((5, 4, 4, 3)))


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, lose_labels, lose_meta, break_meta, empty_meta, swap_type])
def test_damaged_entries_are_built_again(array_cache: Path, damage: Any) -> None:
    first = cached("made", "x", draft)
    images = first.train.images.copy()
    damage(array_cache / "made-v1-x")
    built: list[int] = []
    again = cached("made", "x", lambda: (built.append(1), draft())[1])
    assert built == [1]
    assert again.digest == first.digest
    np.testing.assert_array_equal(again.train.images, images)
    cached("made", "x", never)


def test_copied_entry_is_checked_and_kept(array_cache: Path) -> None:
    """Copying changes the times of the files: they are read in full once, and found to be right."""
    cached("made", "x", draft)
    for path in (array_cache / "made-v1-x").glob("*.npy"):
        os.utime(path, (1, 1))
    cached("made", "x", never)


def test_what_a_killed_writer_left_is_swept(array_cache: Path) -> None:
    left = array_cache / ".made-v1-x.partial"
    left.mkdir(parents=True)
    (left / "train-images.npy").write_bytes(b"half")
    cached("made", "x", draft)
    assert not left.exists()


def test_failure_while_writing_leaves_nothing(array_cache: Path) -> None:
    def broken() -> Any:
        yield np.zeros((2, 4, 4, 3), np.uint8)
        raise InputError("a bad image")

    bad = replace(draft(), train=Blocks((5, 4, 4, 3), np.arange(5), broken()))
    with pytest.raises(InputError, match="a bad image"):
        cached("made", "x", lambda: bad)
    assert [path.name for path in array_cache.iterdir()] == ["made-v1-x.lock"]
    cached("made", "x", draft)


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDCIL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="cannot be written") as error:
        cached("made", "x", draft)
    assert "FEDCIL_CACHE" in error.value.next


def test_full_disk_is_an_error_that_names_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "sync_file", full)
    with pytest.raises(InputError, match="No space left"):
        cached("made", "x", draft)


CHILD = """
import sys, time
from pathlib import Path
import numpy as np
from fedcil.data.cache import Blocks, Draft, cached
log = Path(sys.argv[1])
def blocks():
    for value in range(5):
        time.sleep(0.1)
        yield np.full((1, 4, 4, 1), value, np.uint8)
def prepare():
    with log.open("a") as file:
        file.write("built\\n")
    labels = np.arange(5)
    shape = (5, 4, 4, 1)
    return Draft(name="made", train=Blocks(shape, labels, blocks()), test=Blocks(shape, labels, blocks()),
                  mean=(0.5,), std=(0.5,), class_names=tuple("abcde"))
print(cached("made", "x", prepare).digest)
"""


def test_two_processes_decode_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", CHILD, str(log)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    digests = {child.communicate(timeout=60)[0].strip() for child in children}
    assert [child.returncode for child in children] == [0, 0]
    assert log.read_text() == "built\n"
    assert len(digests) == 1


def test_fingerprint_sees_edits_moves_and_options(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("1")
    first = fingerprint([path], 8)
    assert fingerprint([path], 8) == first
    assert fingerprint([path], 16) != first
    path.write_text("22")
    assert fingerprint([path], 8) != first


@pytest.mark.usefixtures("no_home")
def test_who_has_no_home_is_told_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDCIL_CACHE", raising=False)
    with pytest.raises(InputError, match="there is no home folder ~ here") as error:
        cached("made", "x", draft)
    assert "FEDCIL_CACHE" in error.value.next


def test_a_source_that_cannot_be_read_is_no_fault_of_the_cache() -> None:
    def locked() -> Draft:
        raise PermissionError(13, "Permission denied", "/data/train")

    with pytest.raises(InputError, match="cannot be read: Permission denied") as error:
        cached("made", "x", locked)
    assert error.value.where == "/data/train"
    cached("made", "x", draft)
