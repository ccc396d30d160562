"""Churn: nearly everybody is replaced within three rounds; nobody fails, and nothing of those who left is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fedcil
from fedcil.experiment import open_experiment
from fedcil.record.run import Run
from fedcil.scenario_file import load_scenario
from scenarios.reliability.common import Fault, Outcome

TASKS, MEMBERS, REPLACED = 5, 200, 0.3
ROUNDS = 20  # of each task


def scenario(method: dict[str, Any], seed: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """Of 200 members 60 leave and 60 join before every round but the first: 6,140 clients in 100 rounds."""
    data = {"name": "synthetic", "classes": 10, "image_size": 4, "test_per_class": 5}
    return {
        "name": str(method["name"]),
        "seed": seed,
        "data": data | {"samples_per_class": 200 * rounds},
        "stream": {"tasks": TASKS},
        "partition": {"name": "iid"},
        "population": {
            "name": "turnover",
            "size": MEMBERS,
            "replaced_per_task": REPLACED,
            "replaced_per_round": REPLACED,
        },
        "clients": {"count": MEMBERS + 60 * (TASKS * rounds - 1), "per_round": 10},
        "model": {"width": 2},
        "method": method,
        "training": {"rounds": rounds, "epochs": 1, "batch_size": 4},
        "engine": {"workers": 1},
        "server": {"evaluate_every": 0},
    }


def problems(run: Run) -> Iterator[str]:
    """Rounds in which somebody failed or was no member, and what is still known of leavers at the end."""
    opened = open_experiment(load_scenario(run.path / "scenario.toml"))
    population, timeline = opened.population, opened.timeline
    for line in run.kind("round"):
        present = population.present(timeline.round_number(line["task"], line["phase"], line["round"]))
        well = line["status"] == "ok" and not line["failures"] and line["answered"] == line["cohort"]
        if not well or present.sum() != MEMBERS or not present[line["cohort"]].all():
            yield f"task {line['task']}, round {line['round']}: {line['status']}, {line['failures']}"
    last = population.present(timeline.rounds - 1)
    for checkpoint in checkpoints(run):
        known = [*map(int, checkpoint["client_states"]), *checkpoint["holders"]]
        if not last[known].all() or checkpoint["client_states"].keys() != checkpoint["client_state_bytes"].keys():
            yield "a checkpoint knows clients that have left"
    if {path.stem for path in (run.path / "client_states").glob("*")} != named_states(run):
        yield "client states on the disk are not those that the checkpoints name"


def checkpoints(run: Run) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in (run.path / "checkpoints").glob("state-*.json")]


def named_states(run: Run) -> set[str]:
    """Files of client states that a checkpoint needs."""
    return {name for checkpoint in checkpoints(run) for name in checkpoint["client_states"].values()}


def churn(seed: int, workdir: Path) -> Outcome:
    """With FedER, whose clients keep exemplars."""
    run = fedcil.run(scenario({"name": "feder", "memory": 4}, seed), output=workdir, figures=False)
    problem = next(problems(run), "")
    return Outcome(not problem, problem or "nobody failed, nothing of leavers is kept")


FAULTS = (Fault("churn", "nobody fails, and nothing of those who left is kept", churn, trials=20),)
