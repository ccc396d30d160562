"""Errors a person can act on: what was wrong, where, what is allowed, what to do next."""

from __future__ import annotations

import difflib
import os
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class FedcilError(Exception):
    """Base of every error that fedcil raises on purpose.

    ``where`` names the file, key, client or folder; ``allowed`` what would have been accepted;
    ``next`` the step that mends it. ``exit_code`` is what the command line ends with.
    """

    kind = "failed"
    exit_code = 1

    def __init__(self, what: str, *, where: str = "", allowed: str = "", next: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.allowed = allowed
        self.next = next

    def __str__(self) -> str:
        lines = [self.what]
        lines += [f"  {name}: {text}" for name, text in self.as_dict().items() if text and name in LABELS]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, str]:
        return {
            "kind": self.kind,
            "what": self.what,
            "where": self.where,
            "allowed": self.allowed,
            "next": self.next,
        }


LABELS = ("where", "allowed", "next")


def did_you_mean(given: str, names: Iterable[str]) -> str:
    """A hint with the nearest of ``names``, or nothing."""
    near = difflib.get_close_matches(given, names, n=1)
    return f"; did you mean {near[0]!r}?" if near and near[0] != given else ""


def described(error: BaseException) -> str:
    """An error of somebody's own code in a line: its type, what it says, and the last file and line of theirs. If none
    is (a function that takes other arguments, say), the file is one of ours, shown with its folder.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(OTHERS)]
    last = (own or frames)[-1:]
    place = "".join(f" ({'/'.join(Path(each.filename).parts[-1 if own else -2 :])}:{each.lineno})" for each in last)
    try:
        said = str(error)
    except Exception:  # that is somebody's own, too
        said = "without words"
    return printable(f"{type(error).__name__}: {said[:LONGEST]}{place}")


HANDLERS = ("fedcil", "flwr", "ray")  # whose handlers of signals raise SystemExit


def asked_to_end(error: BaseException) -> bool:
    """Whether it is a SystemExit that a signal's handler raised, and not the code that this broke off."""
    innermost = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1:]
    raised_by = "".join(str(frame.f_globals.get("__name__")) for frame in innermost)
    return isinstance(error, SystemExit) and raised_by.partition(".")[0] in HANDLERS


LONGEST = 400  # characters of what somebody else's error says


def printable(text: str) -> str:
    """Without what a file or a terminal cannot take as text: halves of characters, as in a file's name that is not
    UTF-8, and commands for terminals.
    """
    return "".join(each if each.isprintable() or each in "\n\t" else repr(each)[1:-1] for each in text)


_ROOT = Path(__file__).parent.parent
OTHERS = (
    *(f"{_ROOT / name}{os.sep}" for name in ("fedcil", "client", "server")),
    *(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "purelib", "platlib")),
)
"""Where files are that are not a person's own."""


def rebuilt(said: Mapping[str, Any]) -> FedcilError:
    """The error that another process wrote down: ``as_dict`` and its ``exit_code``."""
    error = FedcilError(said["what"], **{name: said[name] for name in LABELS})
    error.kind, error.exit_code = said["kind"], said["exit_code"]
    return error


class RunFailed(FedcilError):
    """The run could not go on."""


class ScenarioError(FedcilError):
    """The scenario is not one that can be run."""

    kind = "bad_scenario"
    exit_code = 2


class InputError(FedcilError):
    """Something else that the user gave does not fit: a path, an option, a run folder."""

    kind = "bad_input"
    exit_code = 2


class DataMissing(FedcilError):
    """A data set is not where it was looked for."""

    kind = "data_missing"
    exit_code = 2


class FolderBusy(FedcilError):
    """Another process is writing to this run folder."""

    kind = "folder_busy"
    exit_code = 3


class NotResumable(FedcilError):
    """The run folder cannot be continued: no intact checkpoint, or something in it changed."""

    kind = "not_resumable"
    exit_code = 3


class TooFewClients(FedcilError):
    """Too few clients answered for too many rounds; the last checkpoint is kept."""

    kind = "too_few_clients"
    exit_code = 4


class MessageRefused(FedcilError):
    """A message from outside is broken or does not belong to this round."""

    kind = "message_refused"


@contextmanager
def reading(what: str, where: str, next: str) -> Iterator[None]:
    """Raises InputError that names the file, or else ``where``, if one that is read within cannot be."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{what} cannot be read: {reason}", where=str(error.filename or where), next=next) from None


@contextmanager
def located(source: str) -> Iterator[None]:
    """What is found wrong with a scenario after it was read names the file too."""
    try:
        yield
    except ScenarioError as error:
        if source not in error.where:
            error.where = f"{source}: {error.where}" if error.where else source
        raise


class Stopped(FedcilError):
    """Somebody asked the run to stop (Ctrl-C, SIGTERM or a time limit); a checkpoint was saved."""

    kind = "stopped"

    def __init__(self, exit_code: int) -> None:
        super().__init__("the run was stopped", next="continue it with `fedcil resume RUN`")
        self.exit_code = exit_code
