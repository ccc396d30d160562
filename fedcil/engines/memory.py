"""How much memory a run takes: a prediction, from the scenario and the data alone, and what there is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fedcil.engines.gpu import COPIES
from fedcil.engines.workers import in_processes, worker_count
from fedcil.experiment import Experiment
from fedcil.models.network import snapshot
from fedcil.tensors import count_bytes

TORCH_MB = 570  # resident after the first step of a small network
PROCESSES_MB = 460  # worker processes of a long run: a second torch, which all of them share
PROCESS_MB = 20  # and what each of them has of its own, beside a pool
KEPT = 3  # freed memory is kept: clients, boundary and evaluation each leave some that the others do not use
KEPT_BYTES = 32 << 20  # of a tensor; the memory of a larger one goes back, whatever the C library is told
CGROUPS = Path("/sys/fs/cgroup")


def too_large(experiment: Experiment) -> list[str]:
    """A note, where the system may end a run without a word; none where a card or other machines do the work."""
    if experiment.compute.device.type != "cpu" or experiment.scenario.engine.address:
        return []
    need, there = predicted_memory(experiment), machine_bytes() >> 20
    words = f"this may take about {need:,} MB of memory, more than the {there:,} MB that there are"
    return [words] if need > there else []


def machine_bytes() -> int:
    """Memory of this machine, or of the container that this runs in where it has less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of version 2 and 1
        with suppress(OSError, ValueError):  # version 2 says "max" where there is none
            limits.append(int((CGROUPS / limit).read_text()))
    return min(limits)


def predicted_memory(experiment: Experiment) -> int:
    """MB of one process: torch itself, the images, and ``KEPT`` times a pool and what each client at work needs: five
    copies of the model (parameters, gradients, anchor, contribution, partial sum), or of the statistics that a method
    sends instead, and the activations of a batch with their gradients; or what the boundary needs, if that is more. A
    robust fold keeps the models of a whole round.
    """
    scenario, task, model = experiment.scenario, experiment.stream.tasks[-1], model_bytes(experiment)
    stored = experiment.data.train.nbytes + experiment.data.test.nbytes
    batch = scenario.training.batch_size
    if experiment.method.client_memory is None:  # what clients keep joins their samples
        batch = min(batch, max(int(experiment.counts(each).max()) for each in experiment.stream.tasks))
    extra = scenario.method.extra_images(batch, task)
    layers = outputs(experiment)
    at_once = worker_count(experiment) * experiment.execution.at_once
    cohort = 0 if scenario.server.fold == "mean" else scenario.clients.per_round * model
    fits = [phase for phase in experiment.phases(task) if phase.work == "fit"]
    largest = max([model, *(count_bytes(experiment.sent(phase, task, {})) for phase in fits)])
    clients = at_once * (KEPT * COPIES * largest + activation_bytes(layers, batch + extra.in_step))
    work = KEPT * experiment.pool_bytes() + max(clients, activation_bytes(layers, extra.at_boundary))
    return int(TORCH_MB + (stored + cohort + work) / 2**20)


def processes_memory(experiment: Experiment) -> int:
    """MB beyond that, if inline workers are processes in the end: each makes a pool of its own."""
    workers = worker_count(experiment)
    if not in_processes(experiment.scenario, workers, model_bytes(experiment)):
        return 0
    return int(PROCESSES_MB + (workers - 1) * (PROCESS_MB + KEPT * experiment.pool_bytes() / 2**20))


def model_bytes(experiment: Experiment) -> int:
    """Of the model in the last task."""
    return count_bytes(snapshot(experiment.compute.architecture.build(experiment.stream.tasks[-1].seen)))


def activation_bytes(layers: Sequence[int], images: int) -> int:
    """What ``layers`` put out for so many images, and the gradients of that, as long as it is kept."""
    return sum(2 * size * images * (KEPT if size * images <= KEPT_BYTES else 1) for size in layers)


@torch.no_grad()
def outputs(experiment: Experiment) -> list[int]:
    """Bytes that each layer of the classifier puts out for one image."""
    network = experiment.compute.architecture.build(1)
    sizes: list[int] = []

    def note(_: nn.Module, __: object, output: object) -> None:
        sizes.extend(leaf.numel() * leaf.element_size() for leaf in tree_leaves(output) if isinstance(leaf, Tensor))

    for layer in network.modules():
        if not list(layer.children()):
            layer.register_forward_hook(note)
    network.eval()(torch.zeros(1, *experiment.compute.architecture.image))
    return sizes
