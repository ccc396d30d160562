"""The workers of a run on Ray: what one is, and which there are."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

from client.handle import handle
from client.problems import GpuBroken
from client.states import StateStore
from client.worker import Shared, Worker
from fedcil.allocator import keep_freed_memory
from fedcil.engines import Setting
from fedcil.engines.flat import Flat, FlatReply, Row
from fedcil.engines.ray_room import node_names, room
from fedcil.engines.signals import ignored_by_this_process_alone
from fedcil.engines.workers import CpuSeconds, WorkerShare
from fedcil.errors import RunFailed
from fedcil.experiment import open_experiment
from fedcil.messages import Broadcast, Job, Payload, Request
from fedcil.record.identity import Identity, unlike, worker_identity
from fedcil.rule import Rule
from fedcil.scenario import Scenario

LOOK_FOR_NODES_S = 1.0


class ClientWorker:
    """One actor: a worker with its own copy of everything that follows from the scenario."""

    def __init__(self, scenario: Scenario, data_root: Path | None, states: Path) -> None:
        keep_freed_memory()
        ignored_by_this_process_alone()
        self._worker = Worker(Shared(open_experiment(scenario, data_root), StateStore(states)))
        self._payload: Payload | None = None
        self._cpu = CpuSeconds()

    def identity(self) -> Identity:
        return worker_identity(self._worker.shared.experiment)

    def run(
        self,
        place: Broadcast,
        model: Flat,
        payload: tuple[str, list[Any]] | None,
        jobs: list[Row],
        cohort: int,
        rule: Rule,
    ) -> FlatReply:
        """The jobs of one piece, as rows. ``place`` is the broadcast without its tensors; ``payload`` is
        (hash, [reference]): read only when it is not held already.
        """
        if payload is not None and (self._payload is None or self._payload.hash != payload[0]):
            self._payload = Payload(ray.get(payload[1][0]).tensors(), payload[0])
        held = self._payload if payload is not None else None
        broadcast = replace(place, tensors=model.tensors(), payload=held)
        request = Request(broadcast, tuple(Job(*row) for row in jobs), cohort, rule)
        try:
            return FlatReply.of(handle(request, self._worker), self._cpu.since_last())
        except (GpuBroken, torch.AcceleratorError):
            os._exit(1)  # Ray starts another; in this process all that comes would fail, at once


class Crew:
    """The workers of a run. Where ``engine.workers`` leaves it open, a cluster that grows brings more of them."""

    def __init__(self, setting: Setting, share: WorkerShare) -> None:
        scenario = setting.experiment.scenario
        self.identity = worker_identity(setting.experiment)
        self.workers: list[Any] = []
        self._limit = scenario.engine.workers or scenario.clients.per_round
        self._share = share
        self._looked = 0.0
        self._no_use: frozenset[str] = frozenset()  # nodes that were there when one could not train
        held = {"num_cpus": share.cpus, "num_gpus": share.gpus}
        actor = ray.remote(**held, max_restarts=-1, max_task_retries=0)(ClientWorker)
        root = setting.data_root.absolute() if setting.data_root else None
        self._hire = partial(actor.remote, scenario, root, setting.states.absolute())

    def newcomers(self) -> list[Any]:
        """Workers for which the cluster has room now; looked at once in LOOK_FOR_NODES_S seconds."""
        if len(self.workers) >= self._limit or time.monotonic() - self._looked < LOOK_FOR_NODES_S:
            return []
        self._looked = time.monotonic()
        if self._no_use and node_names() <= self._no_use:
            return []
        hired = [self._hire() for _ in range(min(self._limit, room(self._share)) - len(self.workers))]
        self.workers += hired
        return hired

    def dismiss(self, worker: Any) -> None:
        """Its place stays empty until another node joins: Ray would put the next one there, too."""
        ray.kill(worker)
        self.workers.remove(worker)
        self._no_use = node_names()

    def refuse_stranger(self, there: Identity) -> None:
        differing = unlike(there, self.identity)
        if differing:
            raise RunFailed(
                f"a Ray worker differs: {differing}",
                where="engine",
                next="give every node the same fedcil, torch and data, then `fedcil resume RUN`",
            )
