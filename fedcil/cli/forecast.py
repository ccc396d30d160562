"""``fedcil plan``: what a run would do, from the scenario and the data alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedcil.availability import Availability
from fedcil.clock import asked_clients
from fedcil.engines.memory import model_bytes, predicted_memory, processes_memory, too_large
from fedcil.experiment import Experiment
from fedcil.keys import Key
from fedcil.methods.base import Phase, no_boundary
from fedcil.methods.settings import MethodSettings
from fedcil.models.network import count_parameters, grow_head
from fedcil.stream import Task
from fedcil.tensors import Tensors, count_bytes


def forecast(experiment: Experiment) -> dict[str, Any]:
    """Counts that are exact, and a prediction of memory that is not."""
    scenario = experiment.scenario
    model = experiment.first_state().server.model
    tasks, payload = [], 0
    there = experiment.conditions.availability
    for task in experiment.stream.tasks:
        model = grow_head(model, task.seen, Key(0).torch()) if task.old else model
        tasks.append(forecast_task(experiment, task, model, payload, there))
        payload = scenario.method.payload_bytes(model, experiment.compute)
    network = experiment.compute.architecture.build(experiment.stream.tasks[-1].seen)
    return {
        "name": scenario.name,
        "method": scenario.method.name,
        "engine": scenario.engine.name,
        "availability": scenario.availability.name,
        "population": scenario.population.name,
        "numeric_configuration": experiment.numeric(),
        "parameters": count_parameters(network),
        "model_bytes": count_bytes(model),
        "train_images": len(experiment.data.train.labels),
        "test_images": len(experiment.data.test.labels),
        "tasks": tasks,
        "predicted_memory_mb": predicted_memory(experiment),
        "processes_memory_mb": processes_memory(experiment),
        "notes": [
            *experiment.notes,
            *idle_clients(experiment),
            *late_updates(experiment),
            *unknown_payload(experiment),
            *too_large(experiment),
        ],
    }


def idle_clients(experiment: Experiment) -> list[str]:
    """Who is asked and cannot train: with fewer samples than a batch where a rest is dropped, and nothing kept."""
    training, few = experiment.scenario.training, set[int]()
    if training.batches != "drop_last" or not training.epochs or experiment.method.client_memory:
        return []
    for task in experiment.stream.tasks:
        counts = experiment.counts(task)
        if any(phase.work == "train" for phase in experiment.phases(task)):
            few |= set(np.flatnonzero((counts > 0) & (counts < training.batch_size)).tolist())
    words = f"have fewer samples of a task than training.batch_size = {training.batch_size} and do not train in it"
    many = f"{len(few)} of {experiment.scenario.clients.count}"
    return [f"training.batches = 'drop_last': {many} clients {words}"] if few else []


def unknown_payload(experiment: Experiment) -> list[str]:
    """What an own method hands to clients shows only in the run, if its settings do not say."""
    method = experiment.scenario.method
    if type(method).payload_bytes is not MethodSettings.payload_bytes or experiment.method.boundary is no_boundary:
        return []
    return [f"what the boundary of {method.name!r} hands to clients is not counted: its settings have no payload_bytes"]


def late_updates(experiment: Experiment) -> list[str]:
    """What waits for its round is counted nowhere: how much that is shows only in the run."""
    words = "clock.late = 'fold': an update on its way is kept in memory and in checkpoints, and not counted here: "
    each = f"{model_bytes(experiment) / 1e6:.1f} MB for each client that is late"
    return [words + each] if experiment.scenario.clock.late == "fold" else []


def forecast_task(
    experiment: Experiment, task: Task, model: Tensors, payload: int, there: Availability
) -> dict[str, Any]:
    """``payload_bytes_down`` is what comes if no client is asked twice before all were: at most that.

    Drop-outs and the simulated clock are not looked ahead at: up comes what is wanted.
    """
    counts, clients = experiment.counts(task), experiment.scenario.clients
    phases = experiment.phases(task)
    present = [present_clients(experiment, task, phase, there) for phase in range(len(phases))]
    many = asked_clients(clients.per_round, clients.over_sample)
    asked = [_limited(here, phase, many) for here, phase in zip(present, phases, strict=True)]
    trained = [_limited(here, phase, clients.per_round) for here, phase in zip(present, phases, strict=True)]
    sent = [count_bytes(experiment.sent(phase, task, model)) for phase in phases]
    with_samples, here = int((counts > 0).sum()), [count for each in present for count in each]
    of_members = counts[experiment.population.members(task.index)]
    return {
        "task": task.index,
        "classes": list(experiment.stream.order[task.old : task.seen]),
        "rounds": sum(phase.rounds for phase in phases),
        "client_trainings": sum(trained),
        "clients_with_samples": with_samples,
        "clients_present": {"least": min(here), "mean": sum(here) / len(here), "most": max(here)},
        "samples_per_client": [int(of_members.min()), int(of_members.max())],
        "model_bytes_down": sum(asked) * count_bytes(model),
        "payload_bytes_down": min(with_samples, sum(asked)) * payload,
        "bytes_up": sum(count * size for count, size in zip(trained, sent, strict=True)),
    }


def present_clients(experiment: Experiment, task: Task, phase: int, there: Availability) -> list[int]:
    """Of each round of a phase: how many members are there and have enough samples. No expectation: the run's own
    draws.
    """
    timeline, least = experiment.timeline, experiment.least_samples(experiment.phases(task)[phase])
    enough = experiment.counts(task) >= least
    found = []
    for round_ in range(timeline.lengths(task.index)[phase]):
        number = timeline.round_number(task.index, phase, round_)
        ready = experiment.population.present(number) & enough & there(task.index, phase, round_)
        found.append(int(np.count_nonzero(ready)))
    return found


def _limited(present: list[int], phase: Phase, most: int) -> int:
    """Over the rounds of a phase."""
    return sum(present) if phase.who == "all" else sum(min(count, most) for count in present)


def _clients(row: dict[str, Any]) -> str:
    """Those with samples; how many of them are there in a round, if that is not all of them."""
    all_of_them, least, most = row["clients_with_samples"], *(row["clients_present"][k] for k in ("least", "most"))
    return str(all_of_them) if least == most == all_of_them else f"{least} to {most} of {all_of_them}"


def print_forecast(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    numeric = facts["numeric_configuration"]
    table = Table(title=f"{facts['name']}: {facts['method']} on {numeric['device']} ({numeric['precision']})")
    for name in ("task", "classes", "rounds", "client trainings", "clients", "samples each", "MB down", "MB up"):
        table.add_column(name, justify="right")
    for row in facts["tasks"]:
        low, high = row["samples_per_client"]
        table.add_row(
            str(row["task"] + 1),
            " ".join(map(str, row["classes"])),
            str(row["rounds"]),
            str(row["client_trainings"]),
            _clients(row),
            f"{low}" if low == high else f"{low} to {high}",
            f"{(row['model_bytes_down'] + row['payload_bytes_down']) / 1e6:.1f}",
            f"{row['bytes_up'] / 1e6:.1f}",
        )
    console = Console()
    console.print(table)
    console.print(_in_words(facts))
    for note in facts["notes"]:
        console.print(f"note: {note}", markup=False)


def _in_words(facts: Mapping[str, Any]) -> str:
    more, there = facts["processes_memory_mb"], facts["availability"]
    return (
        f"{facts['parameters']:,} parameters, {facts['model_bytes'] / 1e6:.1f} MB a model; "
        f"{facts['train_images']:,} training and {facts['test_images']:,} test images; "
        f"about {facts['predicted_memory_mb']:,} MB of memory"
        + (f" ({more} more in a long run, for worker processes)" if more else "")
        + f"; engine {facts['engine']}; "
        + ("clients are always there" if there == "always" else f"clients are there by availability.name = {there}")
        + (f", population {facts['population']}" if facts["population"] != "fixed" else "")
    )
