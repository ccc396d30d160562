"""What a run is known by: to its workers, to a resume, and to whoever looks for a finished one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedcil.errors import NotResumable
from fedcil.experiment import Experiment
from fedcil.partition import digest_of_partition
from fedcil.scenario import flatten
from fedcil.sources import program

Identity = Mapping[str, Any]


def identity(experiment: Experiment) -> dict[str, Any]:
    """What must be the same wherever a run's clients are trained. A shipped partition follows from the scenario; a
    person's own may not, by mistake.
    """
    own = ":" in experiment.scenario.partition.name
    return {
        "scenario": experiment.scenario.deciding(),
        "data": experiment.data.digest,
        "numeric": experiment.numeric(),
    } | ({"partition": digest_of_partition(experiment.partition)} if own else {})


def run_identity(experiment: Experiment) -> dict[str, Any]:
    """What must not change between a checkpoint and its resume: ``identity``, and who was said to be there. Raises what
    ``experiment.conditions`` raises.
    """
    digest = experiment.conditions.availability.digest
    return identity(experiment) | ({"availability": digest} if digest else {})


def refuse_changes(saved: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """NotResumable that lists every key with a value other than the saved one."""
    saved, now = flatten(saved), flatten(now)
    names = [name for name in sorted(saved.keys() | now.keys()) if saved.get(name) != now.get(name)]
    if names:
        changes = "; ".join(f"{name} was {saved.get(name)}, now {now.get(name)}" for name in names)
        raise NotResumable(
            f"this run was made differently: {changes}",
            where=str(path),
            allowed="a change of engine.* but engine.lanes, server.checkpoint_every, and where data and files lie",
            next="resume with what it was made with (environment.json), or start a new run",
        )


def worker_identity(experiment: Experiment) -> Identity:
    """What all workers of a run must have in common with it, or bits would depend on who did what: ``identity``,
    fedcil's files (two commits may have one version), a person's own modules, and what their program may have switched
    in torch; as JSON would bring it.
    """
    switches = {
        "default_dtype": str(torch.get_default_dtype()),
        "mkldnn": torch.backends.mkldnn.enabled,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    code = {"fedcil_files": program(), "own_code": experiment.scenario.own_code()}
    mine = {**identity(experiment), **code, "torch": switches}
    plain: Identity = json.loads(json.dumps(flatten(mine)))
    return plain


def unlike(there: Identity, here: Identity) -> str:
    """In words; empty if there are none."""
    differing = [name for name in here if there.get(name) != here[name]]
    return "; ".join(f"{name} is {there.get(name)} there, {here[name]} here" for name in differing)
