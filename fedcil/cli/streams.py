"""What commands write to: a stream that cannot take it changes nothing in a run."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedcil.errors import FedcilError

CLOSED = 128 + signal.SIGPIPE  # exit code of a command whose reader has gone


class Whole(io.FileIO):
    """Takes all that it is given, waiting where somebody has made it one that does not wait."""

    def write(self, data: Any) -> int:
        rest = given = memoryview(data).cast("B")
        while rest:
            written = super().write(rest)
            if written is None:
                select.select([], [self], [])
            else:
                rest = rest[written:]
        return given.nbytes


class Log(Whole):
    """stderr. What a full disk, a closed pipe or a terminal that has gone cannot take is left unsaid."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


class Results(Whole):
    """stdout. A command ends as soon as its output is not all there; nobody waits at a terminal that has gone."""

    told = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            terminal_gone = error.errno == errno.EIO and stat.S_ISCHR(os.fstat(self.fileno()).st_mode)
            if self.told or terminal_gone:
                return memoryview(data).nbytes
            self.told = True
            raise as_end(error) from None


def as_end(error: OSError) -> SystemExit | FedcilError:
    if error.errno == errno.EPIPE:
        return SystemExit(CLOSED)
    return FedcilError(
        f"cannot write the output of this command: {error.strerror}",
        where="stdout",
        next="make room, or name another file; what has run is in its run folder (`fedcil list`)",
    )


def put_in_place() -> None:
    """For stdout and stderr, where they are still what Python has made of them. A character that a terminal cannot show
    becomes a question mark.
    """
    sys.stdout = wrapped(sys.stdout, sys.__stdout__, Results)
    sys.stderr = wrapped(sys.stderr, sys.__stderr__, Log)


@contextlib.contextmanager
def to_stderr() -> Iterator[None]:
    """What anybody prints meanwhile, a person's own code, a library of theirs or Ray, is no result of the command."""
    with contextlib.redirect_stdout(sys.stderr), _descriptor_to_stderr():
        yield


@contextlib.contextmanager
def _descriptor_to_stderr() -> Iterator[None]:
    """The same for those who do not write through Python's stream, and for processes that are started meanwhile."""
    try:
        kept = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # somebody has closed one of the two
        yield
        return
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def wrapped(stream: Any, first: Any, kind: type[io.FileIO]) -> Any:
    if stream is None:  # closed by whoever called
        return Path(os.devnull).open("w", encoding="utf-8")
    if stream is not first:
        return stream
    stream.flush()
    file = kind(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        file if stream.write_through else io.BufferedWriter(file),
        encoding=stream.encoding,
        errors="replace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
