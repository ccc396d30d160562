"""How much of a GPU a worker gets where the scenario does not say: by memory, measured once at the start of a run.

The measurement ran on one H200. Arithmetic, memory and Ray's workers with shares are tested on a card that is played;
workers that share a real one were never run.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch.nn import functional as F

from client.training import LocalSGD
from fedcil.errors import ScenarioError
from fedcil.experiment import Experiment
from fedcil.models.network import trained_parameters
from fedcil.tensors import count_bytes

CONTEXT_BYTES = 600 << 20  # of a process, for CUDA itself and the code of its kernels
MARGIN = 1.25  # what an allocator reserves over what is used
USABLE = 0.95  # of the memory that is free
COPIES = 5  # of the model for each client at work: parameters, gradients, anchor, contribution, partial sum
PRECISION = 10_000  # Ray counts resources in ten-thousandths
MOST = 64  # workers on a GPU
GPUS = 16  # of a node, at most


def gpus_per_worker(experiment: Experiment, workers: int) -> float:
    """``engine.gpus_per_worker``; where it is left open, 0 on a CPU, and on a GPU the share that a worker needs."""
    given = experiment.scenario.engine.gpus_per_worker
    device = experiment.compute.device
    if given == 0 and device.type == "cuda":
        raise ScenarioError(
            "workers without a GPU cannot go with a server on one",
            where="engine.gpus_per_worker = 0",
            allowed="a share of a GPU",
            next="leave it out, or set device = 'cpu'",
        )
    if given is not None or device.type != "cuda":
        return given or 0.0
    with contextlib.suppress(torch.OutOfMemoryError):
        return measured_share(experiment, workers)
    torch.cuda.empty_cache()  # which the failed attempt has filled
    return 1.0  # clients are trained one by one then


def measured_share(experiment: Experiment, workers: int) -> float:
    """torch.OutOfMemoryError if the largest step does not fit."""
    device = experiment.compute.device
    need = worker_bytes(experiment, measured_peak(experiment))
    free, _ = torch.cuda.mem_get_info(device)
    wanted = math.ceil(workers / max(1, torch.cuda.device_count()))
    usable = int(USABLE * free) - need  # boundary and evaluation of the server take a part, too
    return share_of_gpu(need, usable, wanted)


def share_of_gpu(need: int, usable: int, wanted: int) -> float:
    """Share of a GPU for a worker that needs so many bytes, if ``wanted`` workers would be enough for a GPU.

    Rounded down, so that the shares of the workers that fit are not more than 1; never more than a whole GPU, even
    where not one fits.
    """
    workers = max(1, min(wanted, usable // need, MOST))
    return one_over(workers)


def even(share: float) -> float:
    """A part of a GPU as one of equal parts: Flower would count what is left over of several GPUs as one more."""
    if not 0.0 < share < 1.0:
        return share
    parts = min(int(1 / share), PRECISION)
    while GPUS / one_over(parts) >= GPUS * parts + 1:  # what rounding leaves over would be a worker more
        parts -= 1
    return one_over(parts)


def one_over(workers: int) -> float:
    return math.floor(PRECISION / workers) / PRECISION


def worker_bytes(experiment: Experiment, step_bytes: int) -> int:
    """Memory of a worker on the device: a step, all training images, model, payload, pool, and CUDA itself."""
    scenario = experiment.scenario
    model = experiment.first_state().server.model
    payload = scenario.method.payload_bytes(model, experiment.compute)
    models = COPIES * experiment.execution.at_once * count_bytes(model)
    held = experiment.data.train.nbytes + models + 2 * payload + experiment.pool_bytes()
    return int(MARGIN * (held + step_bytes)) + CONTEXT_BYTES


def measured_peak(experiment: Experiment) -> int:
    """Bytes on the GPU at the peak of the largest step."""
    device = experiment.compute.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    largest_step(experiment)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()  # what this process reserves no worker can have
    return peak


def largest_step(experiment: Experiment) -> int:
    """A step on as many images as there ever are at once, in clients side by side or at a boundary; their number."""
    scenario, compute, task = experiment.scenario, experiment.compute, experiment.stream.tasks[-1]
    extra = experiment.extra_images
    count = max(experiment.execution.at_once * (scenario.training.batch_size + extra.in_step), extra.at_boundary)
    network = compute.network(task.seen).train()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    images = torch.zeros(count, *compute.architecture.image, device=compute.device)
    labels = torch.zeros(count, dtype=torch.int64, device=compute.device)
    optimizer = LocalSGD(trained_parameters(network), 0.0, scenario.training)
    optimizer.step(F.cross_entropy(network(images), labels))
    return count
