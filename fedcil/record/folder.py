"""The run folder: everything a run leaves behind, and the one writer that may add to it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import numpy as np
from filelock import FileLock, Timeout

from fedcil.errors import FolderBusy, InputError, NotResumable, RunFailed
from fedcil.experiment import Experiment
from fedcil.files import write_atomic
from fedcil.partition import save_partition
from fedcil.record.checkpoints import Checkpoint, CheckpointFolder
from fedcil.record.identity import refuse_changes, run_identity
from fedcil.scenario_file import to_toml
from fedcil.sources import program, revision
from fedcil.state import RunState

PACKAGES = ("fedcil", "torch", "torchvision", "numpy", "flwr", "ray", "pydantic", "safetensors")
METRICS = "metrics.jsonl"
PROBLEM = "problem.json"  # what ended a run on a server, for whoever watches it
SUBMISSION = "submission.json"  # Flower's id of the run, until its supervisor has shown the end
CLIENT_STATES = "client_states"
MOST_COUNTS = 1 << 24  # of samples by task, client and label: 64 MB; more soon fill a disk, and fit no picture


class RunFolder:
    """Writes a run folder; holds its lock from opening to ``close``."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._identity = identity
        self._lock = FileLock(path / ".lock")
        try:
            self._lock.acquire(timeout=0)
            self.checkpoints = CheckpointFolder(path / "checkpoints")
            self._metrics = (path / METRICS).open("ab")
        except Timeout:
            raise FolderBusy(
                "another process is writing to this run",
                where=str(path),
                next="wait for it to end, or start another run",
            ) from None
        except OSError as error:
            self._lock.release()
            raise InputError(
                f"cannot write to this run folder: {error.strerror}", where=str(path), next="make it writable"
            ) from None
        self._saved: RunState | None = None
        self._named_states: frozenset[str] | None = None  # client states at the last look into their folder

    @classmethod
    def create(cls, root: Path, experiment: Experiment) -> Self:
        """A new folder ``<name>-<seed>-<time>[-n]`` below ``root`` with what is known before round 0."""
        # What is wrong with these leaves no folder behind.
        known, scenario = run_identity(experiment), to_toml(experiment.scenario)
        path = new_folder(root, f"{experiment.scenario.name}-{experiment.scenario.seed}")
        return cls._begin(path, experiment, known, scenario)

    @classmethod
    def _begin(cls, path: Path, experiment: Experiment, known: Mapping[str, Any], scenario: str) -> Self:
        """In a folder that is there and has no run in it yet."""
        folder = cls(path, known)
        try:
            folder.write("scenario.toml", scenario)
            folder.write("environment.json", json.dumps(_environment(experiment, known), indent=1))
            with on_disk(path):
                save_partition(path / "partition.npz", experiment.partition)
                if math.prod(experiment.label_counts_shape) <= MOST_COUNTS:
                    counts = BytesIO()
                    np.save(counts, experiment.label_counts(), allow_pickle=False)
                    write_atomic(path / "label_counts.npy", counts.getvalue())
        except BaseException:
            folder.close()
            raise
        return folder

    @classmethod
    def reopen(cls, path: Path, experiment: Experiment) -> tuple[Self, RunState]:
        """An existing folder and the state to continue from; metrics are cut back to that state."""
        folder = cls(path, run_identity(experiment))
        try:
            checkpoint = folder.checkpoints.load()
            refuse_changes(checkpoint.identity, folder._identity, path)
            with on_disk(path):
                folder._cut_metrics(checkpoint.metrics_length)
                folder._note_other_code(experiment.scenario.own_code())
        except BaseException:
            folder.close()
            raise
        folder._saved = checkpoint.state.to(experiment.compute.device)  # it was read on the CPU
        return folder, folder._saved

    @classmethod
    def enter(cls, path: Path, experiment: Experiment) -> tuple[Self, RunState]:
        """Continue what is in the folder, or begin there if nothing was saved yet."""
        if has_checkpoint(path):
            return cls.reopen(path, experiment)
        begun = cls._begin(path, experiment, run_identity(experiment), to_toml(experiment.scenario))
        return begun, experiment.first_state()

    def append(self, line: Mapping[str, Any]) -> None:
        """One whole line at the end of metrics.jsonl, on disk when this returns."""
        content = json.dumps(line, allow_nan=False).encode() + b"\n"
        with on_disk(self.path):
            self._metrics.write(content)
            self._metrics.flush()
            os.fsync(self._metrics.fileno())

    def checkpoint(self, state: RunState) -> None:
        """Save the state unless it is the one saved last."""
        if state is self._saved:
            return
        with on_disk(self.path):
            self.checkpoints.save(Checkpoint(state, self._metrics.tell(), self._identity))
            self._forget_client_states()
        self._saved = state

    def write(self, name: str, content: str) -> None:
        with on_disk(self.path):
            write_atomic(self.path / name, content.encode())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # whole lines are on disk already
            self._metrics.close()
        self._lock.release()

    def _forget_client_states(self) -> None:
        """What simulated clients kept goes when no checkpoint names it any more: it is outdated, or its owner left."""
        named = self.checkpoints.client_states
        if named == self._named_states:
            return
        for path in (self.path / CLIENT_STATES).glob("*.safetensors"):
            if path.stem not in named:
                path.unlink()
        self._named_states = named

    def _note_other_code(self, own: Mapping[str, str]) -> None:
        """A run that goes on with another fedcil, or other modules, is by both: the record names the old digest and the
        new one, where that can be read.
        """
        environment: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):
            environment = json.loads((self.path / "environment.json").read_bytes())
        known: dict[str, str] = environment.get("own_code", {})
        both = {name: _with(known[name], digest) for name, digest in own.items() if name in known}
        now = environment | {"own_code": known | both}
        if environment.get("program"):
            now["program"] = _with(environment["program"], program())
        if environment and now != environment:
            self.write("environment.json", json.dumps(now, indent=1))

    def _cut_metrics(self, length: int) -> None:
        """Rounds after the checkpoint are repeated; what they had written is kept beside."""
        path = self.path / METRICS
        content = path.read_bytes()
        if len(content) < length:
            raise NotResumable("metrics.jsonl is shorter than its checkpoint says", where=str(path))
        if len(content) > length:
            write_atomic(self.path / f"metrics.cut-{time.time_ns()}.jsonl", content[length:])
            self._metrics.truncate(length)
            os.fsync(self._metrics.fileno())
        self._metrics.seek(length)


def _with(digests: str, digest: str) -> str:
    """``a+b``."""
    return digests if digest in digests.split("+") else f"{digests}+{digest}"


@contextlib.contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """A disk that is full or broken ends the run with a message; the last checkpoint stays whole."""
    try:
        yield
    except OSError as error:
        then = "continue the run with `fedcil resume RUN`" if has_checkpoint(path) else "start the run again"
        raise RunFailed(
            f"cannot write: {error.strerror or error}", where=str(path), next=f"make room, then {then}"
        ) from None


def has_checkpoint(path: Path) -> bool:
    """Whether a run can go on in this folder."""
    with contextlib.suppress(OSError):  # a disk that cannot be read has none to offer
        return any((path / "checkpoints").glob("state-*.json"))
    return False


def new_folder(root: Path, stem: str) -> Path:
    """Make ``root/<stem>-<time>``, with a number behind it if somebody was as fast."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    try:
        root.mkdir(parents=True, exist_ok=True)
        for attempt in range(1000):
            path = root / (f"{stem}-{stamp}" + (f"-{attempt}" if attempt else ""))
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path
    except OSError as error:
        raise InputError(
            f"cannot make a run folder: {error.strerror}", where=str(root), next="give another --output"
        ) from None
    raise InputError("a thousand runs started in the same second", where=str(root))


def _environment(experiment: Experiment, known: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "revision": revision(),
        "program": program(),
        "command": sys.argv,
        "numeric_configuration": experiment.numeric(),
        "identity": known,
        "own_code": experiment.scenario.own_code(),
        "data": {
            "name": experiment.data.name,
            "digest": experiment.data.digest,
            "notes": list(experiment.data.notes),
        },
        "class_order": [experiment.data.class_names[index] for index in experiment.stream.order],
    }


def versions() -> dict[str, str | None]:
    """Installed versions of what a run depends on."""
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
