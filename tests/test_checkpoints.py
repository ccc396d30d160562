"""Checkpoints: what is saved comes back bit for bit; whatever breaks, the old state or the new one is there."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedcil.errors import NotResumable
from fedcil.files import write_atomic
from fedcil.messages import Payload
from fedcil.record import checkpoints
from fedcil.record.checkpoints import Checkpoint, CheckpointFolder
from fedcil.state import Cursor, RunState, ServerState
from fedcil.tensor_files import read_tensors, write_tensors
from fedcil.tensors import content_hash
from scenarios.reliability.disk import DiskFault, FailingDisk, torn


def checkpoint(number: int) -> Checkpoint:
    """Model and cursor differ from one to the next; memory every second time, the payload never."""
    server = ServerState(
        model={"weight": torch.full((3, 4), float(number)), "bias": torch.arange(4.0) + number},
        memory={"gram": torch.full((2, 2), number // 2, dtype=torch.float64)},
        payload=Payload.of({"teacher": torch.ones(5)}),
    )
    state = RunState(
        server=server,
        cursor=Cursor(number // 3, 0, number % 3),
        client_states={12: "a" * 32, 3: f"{number:032x}"},
        client_state_bytes={12: 100, 3: number},
        holders=frozenset({3, 12, number}),
        short_rounds=number % 2,
    )
    return Checkpoint(state, metrics_length=100 * number, identity={"scenario": "s", "threads": 1})


def bits(of: Checkpoint) -> tuple[Any, ...]:
    """Everything in a checkpoint, tensors by their content."""
    state = of.state
    server = state.server
    payload = server.payload and (server.payload.hash, content_hash(server.payload.tensors))
    plain = replace(state, server=ServerState(model={}))
    tensors = (content_hash(server.model), content_hash(server.memory), payload)
    return (plain, tensors, of.metrics_length, dict(of.identity))


def saved(folder: Path, *numbers: int) -> CheckpointFolder:
    made = CheckpointFolder(folder)
    for number in numbers:
        made.save(checkpoint(number))
    return made


def loaded(folder: Path) -> tuple[Any, ...]:
    return bits(CheckpointFolder(folder).load())


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that write very often: the disk need not follow."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# Round trip


def test_awkward_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    model = {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(-0.0),
        "double": torch.tensor([1 / 3, float("nan"), float("inf")], dtype=torch.float64),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "labels": torch.tensor([-(2**63), 2**63 - 1]),
        "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 7).T,
        "slice": torch.randn(8)[::2],
        "expanded": torch.ones(1).expand(4),
        "tiny": torch.tensor([1e-45]),
        "shared one": shared,
        "shared two": shared[2:],
        "ünïcode.name": torch.ones(1, dtype=torch.bfloat16),
    }
    given = checkpoint(1)
    given = replace(given, state=replace(given.state, server=ServerState(model=model)))
    CheckpointFolder(tmp_path).save(given)
    back = CheckpointFolder(tmp_path).load()
    assert bits(back) == bits(given)
    assert back.state.server.payload is None
    assert back.state.server.memory == {}
    for name, tensor in model.items():
        assert back.state.server.model[name].dtype == tensor.dtype
        assert back.state.server.model[name].shape == tensor.shape


def test_the_first_state_of_all_comes_back(tmp_path: Path) -> None:
    given = Checkpoint(RunState(server=ServerState(model={"x": torch.zeros(1)})), 0, {})
    CheckpointFolder(tmp_path).save(given)
    assert loaded(tmp_path) == bits(given)


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NotResumable, match="no intact checkpoint"):
        CheckpointFolder(tmp_path / "checkpoints").load()


# What is kept


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def named(folder: Path, number: int) -> set[str]:
    plain = json.loads((folder / f"state-{number}.json").read_text())
    return {f"{name}.safetensors" for name in plain["tensors"].values() if name}


def test_the_last_two_are_kept_with_their_tensors_and_nothing_else(tmp_path: Path) -> None:
    made = CheckpointFolder(tmp_path)
    for number in range(7):
        made.save(checkpoint(number))
        states = {f"state-{kept}.json" for kept in range(max(0, number - 1), number + 1)}
        tensors = named(tmp_path, number) | named(tmp_path, max(0, number - 1))
        assert files(tmp_path) == states | tensors
    assert loaded(tmp_path) == bits(checkpoint(6))


def test_a_model_that_comes_again_after_its_file_was_removed_is_written_again(tmp_path: Path) -> None:
    saved(tmp_path, 0, 2, 4, 6, 0)
    assert loaded(tmp_path) == bits(checkpoint(0))


def test_tensors_that_stay_the_same_are_written_once(tmp_path: Path) -> None:
    made = saved(tmp_path, 0)
    payload = tmp_path / f"{Payload.of({'teacher': torch.ones(5)}).hash}.safetensors"
    before = payload.stat().st_ino
    made.save(checkpoint(1))
    assert payload.stat().st_ino == before


def test_files_that_a_kill_left_half_written_are_removed(tmp_path: Path) -> None:
    made = saved(tmp_path, 0)
    (tmp_path / ".state-1.json-0123").write_bytes(b"half")
    (tmp_path / ".abc.safetensors-0123").write_bytes(b"half")
    (tmp_path / "abc.safetensors").write_bytes(b"of a state that was never written")
    made.save(checkpoint(1))
    assert files(tmp_path) == {"state-0.json", "state-1.json"} | named(tmp_path, 0) | named(tmp_path, 1)


def test_files_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    """Others in the group may read what a run in a container left behind, if the umask lets them."""
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    write_atomic(tmp_path / "atomic", b"")
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


# The n-th operation fails


@pytest.mark.parametrize("dead", [False, True])
def test_whichever_operation_fails_the_old_or_the_new_state_is_there(tmp_path: Path, dead: bool) -> None:
    """SQLite's way: n = 1, 2, 3 ... until the save goes through. Then the run goes on, resumed or not."""
    outcomes = set()
    for fail_at in range(1, 100):
        folder = tmp_path / str(fail_at)
        made = saved(folder, 0, 1, 2)
        with pytest.MonkeyPatch.context() as patch:
            disk = FailingDisk(patch.setattr, fail_at, dead)
            try:
                made.save(checkpoint(3))
                failed = False
            except DiskFault:
                failed = True
        found = loaded(folder)
        assert found in (bits(checkpoint(2)), bits(checkpoint(3)))
        outcomes.add((failed, found == bits(checkpoint(3))))
        go_on_saving(folder, made)
        if disk.count < fail_at:
            break
    assert 10 < fail_at < 60
    assert (True, False) in outcomes
    assert (False, True) in outcomes
    assert (False, False) not in outcomes


def go_on_saving(folder: Path, made: CheckpointFolder) -> None:
    """The same process saves again; another one resumes and saves again; nothing is left over."""
    made.save(checkpoint(4))
    assert loaded(folder) == bits(checkpoint(4))
    resumed = CheckpointFolder(folder)
    resumed.load()
    for number in (5, 6):
        resumed.save(checkpoint(number))
        assert loaded(folder) == bits(checkpoint(number))
    numbers = sorted(int(path.stem[6:]) for path in folder.glob("state-*.json"))
    assert len(numbers) == 2
    assert files(folder) == {f"state-{n}.json" for n in numbers} | named(folder, numbers[0]) | named(folder, numbers[1])


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "file"
    for fail_at in (1, 2, 3):
        write_atomic(target, b"old")
        with pytest.MonkeyPatch.context() as patch:
            FailingDisk(patch.setattr, fail_at, dead=False)
            with pytest.raises(DiskFault):
                write_atomic(target, b"new")
        assert target.read_bytes() == b"old"
        assert files(tmp_path) == {"file"}


# Torn and damaged files


@pytest.mark.usefixtures("unsynced")
def test_a_torn_newest_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    """1,000 torn files of the newest state. The resumed run makes that state again and saves over the damage."""
    rng = random.Random(0)
    saved(tmp_path / "whole", 0, 1, 2)
    newest = sorted({"state-2.json", *named(tmp_path / "whole", 2) - named(tmp_path / "whole", 1)})
    assert len(newest) == 3  # JSON, model and memory; the payload is that of the state before
    unharmed = 0
    for trial in range(1000):
        folder = tmp_path / "torn"
        shutil.copytree(tmp_path / "whole", folder)
        path = folder / rng.choice(newest)
        path.write_bytes(torn(path.read_bytes(), rng))
        resumed = CheckpointFolder(folder)
        found = bits(resumed.load())
        unharmed += found == bits(checkpoint(2))
        assert found in (bits(checkpoint(1)), bits(checkpoint(2)))
        if trial % 5 == 0:
            resumed.save(checkpoint(2))
            assert loaded(folder) == bits(checkpoint(2))
            resumed.save(checkpoint(3))
            assert loaded(folder) == bits(checkpoint(3))
            assert len(list(folder.glob("state-*.json"))) == 2
        shutil.rmtree(folder)
    assert unharmed < 50  # white space of the JSON, or noise that was there before


def test_what_two_states_share_is_lost_to_both(tmp_path: Path) -> None:
    """Nothing is made up: without an intact state the run says so, and what is wrong with each."""
    saved(tmp_path, 0, 1)
    (shared,) = named(tmp_path, 0) & named(tmp_path, 1) - {
        f"{content_hash(checkpoint(0).state.server.memory)}.safetensors"
    }
    (tmp_path / shared).write_bytes(b"")
    with pytest.raises(NotResumable) as caught:
        CheckpointFolder(tmp_path).load()
    assert "state-0.json" in caught.value.what
    assert "state-1.json" in caught.value.what
    assert shared in caught.value.what


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"3", b"[]", b"{}", b'"state"', b"\xff\xfe", b"[" * 100_000, b'{"digest": "x"}', b"9" * 5000],
)
def test_json_that_is_no_state_is_passed_over(content: bytes, tmp_path: Path) -> None:
    saved(tmp_path, 0, 1)
    (tmp_path / "state-1.json").write_bytes(content)
    assert loaded(tmp_path) == bits(checkpoint(0))


def test_tensors_in_a_type_that_torch_lacks_are_passed_over(tmp_path: Path) -> None:
    saved(tmp_path, 0, 1)
    head = json.dumps({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    model = tmp_path / f"{content_hash(checkpoint(1).state.server.model)}.safetensors"
    model.write_bytes(len(head).to_bytes(8, "little") + head + b"\0")
    with pytest.raises(ValueError, match="holds no tensors"):
        read_tensors(model)
    assert loaded(tmp_path) == bits(checkpoint(0))


@pytest.mark.usefixtures("unsynced")
def test_1000_malformed_tensor_files_are_refused_in_one_way(tmp_path: Path) -> None:
    """Changed numbers are read, everything else is a ValueError; that numbers changed shows in the hash."""
    rng = random.Random(1)
    path = tmp_path / "x.safetensors"
    write_tensors(path, checkpoint(1).state.server.model)
    whole = path.read_bytes()
    refused = 0
    for _ in range(1000):
        path.write_bytes(torn(whole, rng))
        try:
            read_tensors(path)
        except ValueError:
            refused += 1
    assert refused > 500


# Formats and pickles


def test_a_newer_format_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not passed over for an older one that is there too: the newer fedcil would be robbed of its rounds."""
    made = saved(tmp_path, 0)
    monkeypatch.setattr(checkpoints, "FORMAT", 2)
    made.save(checkpoint(1))
    monkeypatch.setattr(checkpoints, "FORMAT", 1)
    with pytest.raises(NotResumable, match="format 2 is newer than this fedcil's 1") as caught:
        CheckpointFolder(tmp_path).load()
    assert "state-1.json" in caught.value.where
    assert "environment.json" in caught.value.next


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.touch, (self.canary,))


def test_a_pickle_named_safetensors_does_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Bomb(canary))
    pickle.loads(bomb)
    assert canary.exists()  # it is a bomb
    canary.unlink()
    folder = tmp_path / "checkpoints"
    saved(folder, 0, 1)
    for path in list(folder.iterdir()):
        path.write_bytes(bomb)
    with pytest.raises(NotResumable, match="no intact checkpoint"):
        CheckpointFolder(folder).load()
    torch.save({"x": Bomb(canary)}, folder / "state-2.json")
    with pytest.raises(NotResumable, match="no intact checkpoint"):
        CheckpointFolder(folder).load()
    assert not canary.exists()
