"""What commands write to: a stream that cannot take it changes nothing in a run."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from pathlib import Path
from typing import Any

from fedcil.errors import FedcilError

CLOSED = 128 + signal.SIGPIPE  # exit code of a command whose reader has gone


class Progress(io.FileIO):
    """stderr. What a log on a full disk, a closed pipe or a terminal that has gone cannot take is left unsaid."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


class Results(io.FileIO):
    """stdout. Nobody waits at a terminal that has gone; else a command ends as soon as its output is not all there."""

    complete = True

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self.complete and error.errno != errno.EIO:
                self.complete = False
                raise self.end(error) from None
            return memoryview(data).nbytes

    def end(self, error: OSError) -> SystemExit | FedcilError:
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
    sys.stdout = rebuilt(sys.stdout, sys.__stdout__, Results)
    sys.stderr = rebuilt(sys.stderr, sys.__stderr__, Progress)


def rebuilt(stream: Any, first: Any, kind: type[io.FileIO]) -> Any:
    if stream is None:  # closed by whoever called
        return Path(os.devnull).open("w", encoding="utf-8")
    if stream is not first:
        return stream
    file = kind(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        file if stream.write_through else io.BufferedWriter(file),
        encoding=stream.encoding,
        errors="replace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
