"""Disks that fail: the n-th write, sync, rename or removal; torn files; full, read-only and missing folders."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from fedcil.record.checkpoints import Checkpoint, CheckpointFolder
from fedcil.tensors import content_hash
from scenarios.reliability.common import (
    CLEAR,
    Command,
    Fault,
    Outcome,
    await_checkpoint,
    clear,
    error_line,
    folder_in,
    moment,
    resumed,
    scratch,
    start,
)

NOTHING_YET = 1, 2  # exit codes of a run that could not even begin

Put = Callable[[Any, str, Any], None]
"""setattr, or a test's monkeypatch.setattr."""


class DiskFault(OSError):
    """The disk."""

    def __init__(self, what: str) -> None:
        super().__init__(errno.EIO, f"injected: {what}")


class FailingDisk:
    """Counts writes, syncs, renames and removals; the n-th fails, and with ``dead`` all after it."""

    def __init__(self, put: Put, fail_at: int, dead: bool) -> None:
        self.count, self.fail_at, self.dead = 0, fail_at, dead
        self._count_calls(put, os, "fsync")
        self._count_calls(put, Path, "replace")
        self._count_calls(put, Path, "unlink")
        opened = Path.open

        def counted_open(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            file = opened(path, mode, *args, **options)
            return file if mode in ("r", "rb") else HalfWriter(file, self)

        put(Path, "open", counted_open)

    def step(self) -> bool:
        """Count; True if this one fails."""
        self.count += 1
        return self.count == self.fail_at or (self.dead and self.count > self.fail_at)

    def _count_calls(self, put: Put, owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            if self.step():
                raise DiskFault(name)
            return original(*args, **options)

        put(owner, name, counted)


class HalfWriter:
    """A file whose failing write leaves half of its bytes."""

    def __init__(self, file: Any, disk: FailingDisk) -> None:
        self.file, self.disk = file, disk

    def write(self, content: bytes) -> int:
        if self.disk.step():
            self.file.write(content[: len(content) // 2])
            raise DiskFault("write")
        return int(self.file.write(content))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> HalfWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def torn(content: bytes, rng: random.Random) -> bytes:
    """The end is missing, zero, or noise; or one bit is another."""
    place = rng.randrange(len(content))
    kind = rng.randrange(4)
    if kind == 3:
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    rest = len(content) - place
    return content[:place] + [b"", b"\0" * rest, rng.randbytes(rest)][kind]


# The n-th operation of a whole run


@cache
def operations() -> int:
    """Writes, syncs, renames and removals of an undisturbed run."""
    output = scratch("operations")
    command = start(output, prepare=partial(_count_into, output / "count"))
    assert command.wait() == 0, command.said()
    return int((output / "count").read_text())


def _count_into(path: Path) -> None:
    disk = FailingDisk(setattr, -1, dead=False)
    end = os._exit

    def tell(code: int) -> None:
        with open(path, "w") as file:  # noqa: PTH123  (Path.open is counted)
            file.write(str(disk.count))
        end(code)

    os._exit = tell  # type: ignore[assignment]


def failing(dead: bool) -> Callable[[int, Path], Outcome]:
    """The operation with the seed's number fails, and with ``dead`` every one after it; then the disk is mended."""

    def trial(seed: int, workdir: Path) -> Outcome:
        fail_at = seed % operations() + 1
        command = start(workdir, prepare=lambda: break_disk(fail_at, dead))
        if command.wait() == 0:
            folder = folder_in(workdir)
            return resumed(folder, "went on all the same") if folder else Outcome(False, "no checkpoint")
        return resumable_or_never_begun(command, workdir)

    return trial


def break_disk(fail_at: int, dead: bool) -> None:
    FailingDisk(setattr, fail_at, dead)


def resumable_or_never_begun(command: Command, output: Path) -> Outcome:
    folder = folder_in(output)
    problem = clear(command, [1] if folder else NOTHING_YET)
    if problem:
        return Outcome(False, problem)
    return resumed(folder, error_line(command)) if folder else Outcome(True, "clear error before there was anything")


# Torn files


@cache
def intact() -> tuple[Path, tuple[str, str]]:
    """(checkpoints of a run that was stopped, what they hold: newest and the one before)."""
    output = scratch("intact")
    command = start(output, "training.rounds=2")
    assert command.wait() == 0, command.said()
    folder = folder_in(output)
    assert folder is not None
    numbers = sorted(int(path.stem[6:]) for path in (folder / "checkpoints").glob("state-*.json"))
    newest = bits(CheckpointFolder(folder / "checkpoints").load())
    before = scratch("before") / "checkpoints"
    shutil.copytree(folder / "checkpoints", before)
    (before / f"state-{numbers[-1]}.json").unlink()
    return folder / "checkpoints", (newest, bits(CheckpointFolder(before).load()))


def bits(checkpoint: Checkpoint) -> str:
    server = checkpoint.state.server
    payload = server.payload.hash if server.payload else ""
    return f"{content_hash(server.model)} {content_hash(server.memory)} {payload} {checkpoint.state.cursor}"


def torn_write(seed: int, workdir: Path) -> Outcome:
    """A file that only the newest checkpoint names ends at a random byte, or has another bit."""
    folder, (newest, before) = intact()
    copy = workdir / "checkpoints"
    shutil.copytree(folder, copy)
    rng = random.Random(seed)
    path = rng.choice(newest_files(copy))
    path.write_bytes(torn(path.read_bytes(), rng))
    found = bits(CheckpointFolder(copy).load())
    shutil.rmtree(workdir)
    return Outcome(found in (newest, before), {newest: "harmless", before: "the one before"}.get(found, "A MIXTURE"))


def newest_files(folder: Path) -> list[Path]:
    states = sorted(folder.glob("state-*.json"), key=lambda path: int(path.stem[6:]))
    named = [set(filter(None, json.loads(path.read_text())["tensors"].values())) for path in states]
    return [states[-1], *(folder / f"{name}.safetensors" for name in sorted(named[-1] - named[-2]))]


# Full, read-only, missing


@contextlib.contextmanager
def mounted(place: Path, size: str) -> Iterator[Path]:
    """A file system in memory, of its own size. Needs root."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def full_disk(seed: int, workdir: Path) -> Outcome:
    """64 kB to 2 MB of room; more of it before the resume."""
    size = random.Random(seed).randint(16, 500) * 4
    with mounted(workdir / "disk", f"{size}k") as disk:
        command = start(disk / "runs", logs=workdir)
        if command.wait() == 0:
            return Outcome(True, "it was room enough")
        remount(disk, "size=1g")
        return resumable_or_never_begun(command, disk / "runs")


def read_only_disk(seed: int, workdir: Path) -> Outcome:
    """A run is killed, its disk comes back read-only, and then as it was."""
    with mounted(workdir / "disk", "1g") as disk:
        command = start(disk / "runs", logs=workdir)
        folder = await_checkpoint(command, disk / "runs")
        time.sleep(moment(seed))
        command.kill()
        command.wait()
        if folder is None:
            return Outcome(False, "no checkpoint")
        if (folder / "summary.json").exists():
            return resumed(folder, "ended before")
        remount(disk, "ro")
        refused = Command("resume", str(folder), folder=workdir)
        problem = clear(refused, [1, 2])
        remount(disk, "rw")
        return Outcome(False, problem) if problem else resumed(folder, error_line(refused))


def forbidden_folder(seed: int, workdir: Path) -> Outcome:
    """In the middle of a run nothing new may be made in its folder any more, not even by root."""
    command = start(workdir / "runs", logs=workdir)
    folder = await_checkpoint(command, workdir / "runs")
    time.sleep(moment(seed))
    subprocess.run(["chattr", "+i", str(folder / "checkpoints")], check=True) if folder else None
    try:
        ended_before = command.wait() == 0
    finally:
        subprocess.run(["chattr", "-i", str(folder / "checkpoints")], check=True) if folder else None
    return Outcome(True, "ended before") if ended_before else resumable_or_never_begun(command, workdir / "runs")


def missing_folder(seed: int, workdir: Path) -> Outcome:
    """The run folder is removed under a run."""
    command = start(workdir / "runs", logs=workdir)
    folder = await_checkpoint(command, workdir / "runs")
    time.sleep(moment(seed))
    if folder is None or (folder / "summary.json").exists():
        return Outcome(folder is not None, "ended before")
    shutil.rmtree(folder, ignore_errors=True)
    problem = clear(command, NOTHING_YET)
    return Outcome(problem is None, problem or error_line(command))


FAULTS = (
    Fault("disk_operation_fails", CLEAR, failing(dead=False), 400, operations),
    Fault("disk_dies", CLEAR, failing(dead=True), 400, operations),
    Fault("torn_write", "the newest checkpoint, or the one before; never a mixture", torn_write, 1000),
    Fault("full_disk", CLEAR, full_disk, 20),
    Fault("read_only_disk", CLEAR, read_only_disk, 10),
    Fault("forbidden_folder", CLEAR, forbidden_folder, 10),
    Fault("missing_folder", f"{CLEAR.split(';', maxsplit=1)[0]} (nothing is left to resume)", missing_folder, 10),
)
