"""``fedcil plan``: what a run would do, from the scenario and the data alone."""

from __future__ import annotations

import math
from typing import Any

import torch

from fedcil.engines.workers import worker_count
from fedcil.experiment import Experiment
from fedcil.keys import Key
from fedcil.messages import Tensors, count_bytes
from fedcil.models.network import count_parameters, grow_head
from fedcil.stream import Task

TORCH_MB = 700  # resident after the first step of a small network
COPIES = 5


def forecast(experiment: Experiment) -> dict[str, Any]:
    """Counts that are exact, and a prediction of memory that is not."""
    scenario = experiment.scenario
    model = experiment.first_state().server.model
    tasks, payload = [], 0
    for task in experiment.stream.tasks:
        model = grow_head(model, task.seen, Key(0).torch()) if task.old else model
        tasks.append(forecast_task(experiment, task, model, payload))
        payload = scenario.method.payload_bytes(model, experiment.compute)
    network = experiment.compute.architecture.build(experiment.stream.tasks[-1].seen)
    return {
        "name": scenario.name,
        "method": scenario.method.name,
        "engine": scenario.engine.name,
        "availability": "always there" if scenario.availability.name == "always" else scenario.availability.name,
        "numeric_configuration": experiment.numeric(),
        "parameters": count_parameters(network),
        "model_bytes": count_bytes(model),
        "train_images": len(experiment.data.train.labels),
        "test_images": len(experiment.data.test.labels),
        "tasks": tasks,
        "predicted_memory_mb": predicted_memory(experiment, count_bytes(model)),
        "notes": list(experiment.data.notes),
    }


def forecast_task(experiment: Experiment, task: Task, model: Tensors, payload: int) -> dict[str, Any]:
    """``payload_bytes_down`` is what comes if no client is asked twice before all were: at most that."""
    counts = experiment.counts(task)
    phases = experiment.method.phases(task, experiment.scenario.training.rounds)
    asked = [_asked(experiment, phase.who, counts) * phase.rounds for phase in phases]
    sent = {"train": count_bytes(model), "remember": 0}
    if any(phase.work == "fit" for phase in phases):
        sent["fit"] = count_bytes(experiment.statistics(task))
    with_samples = int((counts > 0).sum())
    return {
        "task": task.index,
        "classes": list(experiment.stream.order[task.old : task.seen]),
        "rounds": sum(phase.rounds for phase in phases),
        "client_trainings": sum(asked),
        "clients_with_samples": with_samples,
        "samples_per_client": [int(counts.min()), int(counts.max())],
        "model_bytes_down": sum(asked) * count_bytes(model),
        "payload_bytes_down": min(with_samples, sum(asked)) * payload,
        "bytes_up": sum(count * sent[phase.work] for count, phase in zip(asked, phases, strict=True)),
    }


def _asked(experiment: Experiment, who: str, counts: Any) -> int:
    with_samples = int((counts > 0).sum())
    return with_samples if who == "all" else min(experiment.scenario.clients.per_round, with_samples)


def predicted_memory(experiment: Experiment, model_bytes: int) -> int:
    """MB of one process: torch itself, the images, and for each client at work five copies of the model (parameters,
    gradients, anchor, contribution, partial sum) and the activations of a batch with their gradients.
    """
    scenario, task = experiment.scenario, experiment.stream.tasks[-1]
    stored = experiment.data.train.images.nbytes + experiment.data.test.images.nbytes
    kept, added = scenario.method.extra_images(scenario.training.batch_size, task)
    pool = 4 * kept * math.prod(experiment.compute.architecture.image)
    activations = 2 * (scenario.training.batch_size + added) * activation_bytes(experiment)
    at_once = worker_count(scenario, experiment.stack) * experiment.stack
    return int(TORCH_MB + (stored + pool + at_once * (COPIES * model_bytes + activations)) / 2**20)


@torch.no_grad()
def activation_bytes(experiment: Experiment) -> int:
    """What the layers of the classifier put out for one image."""
    network = experiment.compute.architecture.build(1)
    sizes: list[int] = []
    for layer in network.modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda _, __, output: sizes.append(output.numel() * output.element_size()))
    network.eval()(torch.zeros(1, *experiment.compute.architecture.image))
    return sum(sizes)


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
            str(row["clients_with_samples"]),
            f"{low}" if low == high else f"{low} to {high}",
            f"{(row['model_bytes_down'] + row['payload_bytes_down']) / 1e6:.1f}",
            f"{row['bytes_up'] / 1e6:.1f}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"{facts['parameters']:,} parameters, {facts['model_bytes'] / 1e6:.1f} MB a model; "
        f"{facts['train_images']:,} training and {facts['test_images']:,} test images; "
        f"about {facts['predicted_memory_mb']:,} MB of memory; engine {facts['engine']}; "
        f"clients are {facts['availability']}"
    )
    for note in facts["notes"]:
        console.print(f"note: {note}", markup=False)
