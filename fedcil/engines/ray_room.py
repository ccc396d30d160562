"""How many workers a Ray cluster has room for."""

from __future__ import annotations

from collections.abc import Mapping

import ray

from fedcil.engines.workers import WorkerShare
from fedcil.errors import ScenarioError


def refuse_too_little(workers: int, share: WorkerShare) -> None:
    """Ray would wait for ever for a CPU or GPU that it does not have."""
    if workers > room(share):
        cpus, gpus = (" + ".join(f"{node.get(kind, 0.0):g}" for node in nodes()) for kind in ("CPU", "GPU"))
        raise ScenarioError(
            f"{workers} workers with {share.cpus} CPUs and {share.gpus:g} GPUs each do not fit into "
            f"{cpus} CPUs and {gpus} GPUs",
            where="engine.workers, engine.gpus_per_worker, training.threads",
            allowed="for each worker, on one node, a CPU for each of its threads and its share of a GPU",
            next="lower engine.workers, training.threads or engine.gpus_per_worker",
        )


def room(share: WorkerShare) -> int:
    """How many workers the cluster has room for when nobody else is there."""
    return sum(room_on(node, share) for node in nodes())


def nodes() -> list[dict[str, float]]:
    """What each node has, by kind of resource."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def node_names() -> frozenset[str]:
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


def room_on(node: Mapping[str, float], share: WorkerShare) -> int:
    """A worker's CPUs are of one node, and a part of a GPU is of one GPU."""
    by_cpu, gpus = int(node.get("CPU", 0.0)) // share.cpus, node.get("GPU", 0.0)
    if not share.gpus:
        return by_cpu
    return min(by_cpu, int(gpus) * int(1 / share.gpus) if share.gpus < 1 else int(gpus / share.gpus))


def free_cpus() -> str:
    free, there = (found.get("CPU", 0.0) for found in (ray.available_resources(), ray.cluster_resources()))
    return f"{free:g} of {there:g} CPUs are free"
