"""What all workers of a run must have in common with it, or bits would depend on who did what."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import fedcil
from fedcil.experiment import Experiment
from fedcil.record.folder import identity
from fedcil.scenario import flatten
from fedcil.sources import program

Identity = Mapping[str, Any]


def identity_of(experiment: Experiment) -> Identity:
    """Scenario, data, numeric configuration, fedcil itself (two commits may have one version), a person's own modules,
    and what their program may have switched in torch; as JSON would bring it.
    """
    switches = {
        "default_dtype": str(torch.get_default_dtype()),
        "mkldnn": torch.backends.mkldnn.enabled,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    code = {"fedcil": fedcil.__version__, "fedcil_files": program()}
    mine = {**identity(experiment), **code, "own_code": experiment.scenario.own_code(), "torch": switches}
    plain: Identity = json.loads(json.dumps(flatten(mine)))
    return plain


def differences(there: Identity, here: Identity) -> str:
    """In words; empty if there are none."""
    differing = [name for name in here if there.get(name) != here[name]]
    return "; ".join(f"{name} is {there.get(name)} there, {here[name]} here" for name in differing)


class LoadedFiles:
    """The files of the modules that are loaded now: a process that starts later may find others."""

    def __init__(self) -> None:
        files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
        self._changed_at = {file: _changed_at(file) for file in files if file}

    def changed(self) -> str:
        """One whose file has changed since, or nothing."""
        return next((file for file, when in self._changed_at.items() if _changed_at(file) != when), "")


def _changed_at(file: str) -> int | None:
    """Nanoseconds; None if there is no such file."""
    with contextlib.suppress(OSError):
        return Path(file).stat().st_mtime_ns
    return None
