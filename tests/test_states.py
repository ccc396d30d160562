"""What clients keep: found by its hash, never changed, and what is damaged or gone is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from client.states import StateStore
from fedcil.errors import RunFailed
from fedcil.tensors import content_hash

KEPT = {"images": torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4, 1), "labels": torch.tensor([1, 0])}


def test_a_state_comes_back_by_its_hash(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "not" / "there")
    name = store.save(KEPT)
    assert name == content_hash(KEPT)
    back = store.load(name)
    assert content_hash(back) == name
    assert back["images"].dtype == torch.uint8


def test_nothing_at_all_can_be_kept(tmp_path: Path) -> None:
    """A client whose first task had no samples for it."""
    store = StateStore(tmp_path)
    nothing = {"images": torch.zeros(0, 3, 4, 1, dtype=torch.uint8), "labels": torch.zeros(0, dtype=torch.int64)}
    assert content_hash(store.load(store.save(nothing))) == content_hash(nothing)
    assert store.load(store.save({})) == {}


def test_older_versions_stay(tmp_path: Path) -> None:
    """A resumed run may name the version before the last."""
    store = StateStore(tmp_path)
    names = [store.save({"x": torch.tensor([value])}) for value in range(3)]
    assert [store.load(name)["x"].item() for name in names] == [0, 1, 2]
    assert len(list(tmp_path.iterdir())) == 3


def test_the_same_state_is_one_file(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    assert store.save(KEPT) == store.save(dict(reversed(KEPT.items())))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_missing_state_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=f"client state {'0' * 32} is not there"):
        StateStore(tmp_path).load("0" * 32)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-1], lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_a_damaged_state_is_refused_and_mended_by_the_run_that_makes_it_again(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    store = StateStore(tmp_path)
    name = store.save(KEPT)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunFailed, match=f"client state {name} is damaged") as caught:
        store.load(name)
    assert caught.value.where == str(path)
    store.save(KEPT)
    assert content_hash(store.load(name)) == name
