"""The client side: ``handle(request, worker) -> reply``, or ``do_jobs`` where answers are sent one by one."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Self

import torch
from torch import Tensor

from client.lanes import local_sgd_in_lanes
from client.local_model import LocalModel
from client.memory import joined, updated
from client.problems import ClientProblem, failure
from client.training import Recipe, Trained, learning_rate, local_sgd
from client.worker import Shared, Worker
from fedcil.data.augment import make_batch
from fedcil.errors import MessageRefused
from fedcil.experiment import Experiment
from fedcil.fold import Fold
from fedcil.keys import Key
from fedcil.messages import BORDER, Answer, Broadcast, Failure, Job, Reply, Report, Request
from fedcil.methods.base import TRAINABLE, Phase, Samples
from fedcil.models.network import Network
from fedcil.robust import admissible
from fedcil.rule import Rule
from fedcil.stream import Task
from fedcil.tensors import HALF, Contribution, Tensors, count_bytes
from fedcil.wire import HEADROOM, WEIGHTS


@dataclass(frozen=True)
class Round:
    """What the clients of a request have in common, made when the first of them asks for it."""

    broadcast: Broadcast
    worker: Worker

    @classmethod
    def of(cls, broadcast: Broadcast, worker: Worker) -> Self:
        """From elsewhere a model comes on the CPU."""
        return cls(broadcast.to(worker.shared.device), worker)

    @property
    def shared(self) -> Shared:
        return self.worker.shared

    @cached_property
    def task(self) -> Task:
        return self.shared.experiment.stream.tasks[self.broadcast.task]

    @cached_property
    def phase(self) -> Phase:
        return self.shared.experiment.phases(self.task)[self.broadcast.phase]

    @cached_property
    def key(self) -> Key:
        return self.shared.experiment.round_key(self.broadcast)

    @cached_property
    def bytes_up(self) -> int:
        """Of a trained model."""
        return count_bytes(self.broadcast.tensors)

    @cached_property
    def recipe(self) -> Recipe:
        """After the worker has made its model, or its lanes."""
        experiment = self.shared.experiment
        training = experiment.scenario.training
        return Recipe(
            method=experiment.method,
            prepared=self.shared.prepared(self.broadcast, self.task),
            task=self.task,
            training=training,
            lr=learning_rate(training, self.broadcast.round, self.phase.rounds),
            augment=partial(_augmented, self.shared),
            anchor=tuple(self.broadcast.tensors[name] for name in self.worker.parameters),
            check=self.worker.check,
        )


Metrics = dict[str, float]


def handle(request: Request, worker: Worker) -> Reply:
    """Do every job of a request. A client that breaks becomes a Failure. Raises Stopped, and GpuBroken."""
    round_ = Round.of(request.broadcast, worker)
    fold = Fold.empty(request.cohort, request.rule)
    reports: list[Report] = []
    failures: list[Failure] = []
    for job, given in do_jobs(round_, request.jobs):
        answer = _bounded(given, round_.broadcast, request.rule)
        if isinstance(answer.result, Failure):
            failures.append(answer.result)
        else:
            reports.append(answer.result)
        if answer.contribution is None:
            fold.absent(job.position)
        else:
            fold.add(job.position, answer.contribution)
    return Reply(fold, tuple(reports), tuple(failures))


def _bounded(answer: Answer, broadcast: Broadcast, rule: Rule) -> Answer:
    """What the border of another engine would let through of it."""
    if answer.contribution is None:
        return answer
    try:
        return Answer(answer.result, admissible(answer.contribution, broadcast.tensors, rule))
    except MessageRefused as error:
        return Answer(Failure(answer.result.client, BORDER, error.what))


def do_jobs(round_: Round, jobs: Sequence[Job]) -> Iterator[tuple[Job, Answer]]:
    """Answers as they come, of as many clients at the same time as the scenario's execution has. A contribution's
    tensors are the worker's memory until the next answer is asked for.
    """
    size = round_.shared.experiment.execution.at_once
    for start in range(0, len(jobs), size):
        run = jobs[start : start + size]
        yield from try_at_once(round_, run) or ((job, do_job(round_, job)) for job in run)


def do_job(round_: Round, job: Job) -> Answer:
    """One client's. The contribution's tensors are the worker's memory until its next job."""
    torch.set_num_threads(round_.shared.experiment.scenario.training.threads)
    try:
        return _work(round_, job)
    except (Exception, SystemExit) as error:
        return Answer(failure(job, error))


def try_at_once(round_: Round, jobs: Sequence[Job]) -> list[tuple[Job, Answer]]:
    """All these clients trained at the same time; nothing if that cannot be, and then each is done by itself: who
    breaks alone must not take others along.
    """
    worker, experiment, task = round_.worker, round_.shared.experiment, round_.task.index
    if round_.phase.work != "train" or not experiment.execution.lanes or worker.no_lanes == task:
        return []
    torch.set_num_threads(experiment.scenario.training.threads)
    try:
        return _train_at_once(round_, jobs)
    except (Exception, SystemExit) as error:
        reason, lasts = failure(jobs[0], error).reason, isinstance(error, torch.OutOfMemoryError | TypeError)
    worker.drop_lanes()  # their memory is needed now, and no trace holds them any more
    worker.no_lanes = task if lasts else -1
    warnings.warn(f"clients are trained one by one, not in lanes (engine.lanes): {reason}", stacklevel=2)
    return []


def _work(round_: Round, job: Job) -> Answer:
    """One client's work of the phase: train, fit or remember."""
    started = time.perf_counter()
    shared, task, work = round_.shared, round_.task, round_.phase.work
    local = round_.worker.begin(task.seen, round_.broadcast.tensors)
    own = shared.samples(job.client, task)
    metrics: Metrics = {}
    contribution: Contribution | None = None
    state, state_bytes, bytes_up = job.state, 0, 0
    if work == "train":
        contribution, metrics = _train(round_, job, local, own)
        bytes_up = round_.bytes_up
    elif work == "fit":
        contribution = _fit(local.network, own, task, shared)
        bytes_up = count_bytes(contribution.tensors)
    else:
        state, state_bytes = _remember(job, local.network, own, task, shared)
    report = Report(
        client=job.client,
        samples=len(own.labels),
        metrics=metrics,
        state=state,
        state_bytes=state_bytes,
        bytes_up=bytes_up,
        seconds=time.perf_counter() - started,
    )
    return Answer(report, contribution)


def _train(round_: Round, job: Job, local: LocalModel, own: Samples) -> tuple[Contribution, Metrics]:
    """Local SGD from the broadcast model; the contribution is the model that came out of it."""
    samples = _with_memory(own, job, round_.recipe.task, round_.shared)
    trained = local_sgd(local.network, round_.recipe, samples, round_.key.at("client", job.client))
    local.take_back()
    return _given(local.state, trained, samples, round_.shared.experiment)


def _train_at_once(round_: Round, jobs: Sequence[Job]) -> list[tuple[Job, Answer]]:
    """``_work`` and ``_train`` for several clients at once."""
    started = time.perf_counter()
    worker, shared, task = round_.worker, round_.shared, round_.task
    lanes = worker.lanes_for(task.seen)  # lets go of the last task's before this one's teacher is made
    ready, broken = _samples_of(jobs, task, shared)
    samples = [joined for _, _, joined in ready]
    keys = [round_.key.at("client", job.client) for job, _, _ in ready]
    trained = local_sgd_in_lanes(lanes, round_.broadcast.tensors, round_.recipe, samples, keys)
    seconds = (time.perf_counter() - started) / len(jobs)
    answers: list[tuple[Job, Answer]] = []
    for (job, count, held), (state, said) in zip(ready, trained, strict=True):
        try:
            contribution, metrics = _given(state, said, held, shared.experiment)
        except ClientProblem as problem:
            answers.append((job, Answer(failure(job, problem))))
            continue
        report = Report(
            client=job.client,
            samples=count,
            metrics=metrics,
            state=job.state,
            bytes_up=round_.bytes_up,
            seconds=seconds,
        )
        answers.append((job, Answer(report, contribution)))
    return answers + broken


def _samples_of(
    jobs: Sequence[Job], task: Task, shared: Shared
) -> tuple[list[tuple[Job, int, Samples]], list[tuple[Job, Answer]]]:
    """(job, own samples, samples with what the client kept), and the answers of clients that have none to give."""
    ready: list[tuple[Job, int, Samples]] = []
    broken: list[tuple[Job, Answer]] = []
    for job in jobs:
        try:
            own = shared.samples(job.client, task)
            ready.append((job, len(own.labels), _with_memory(own, job, task, shared)))
        except Exception as error:
            broken.append((job, Answer(failure(job, error))))
    return ready, broken


def _given(state: Tensors, trained: Trained, samples: Samples, experiment: Experiment) -> tuple[Contribution, Metrics]:
    """A trained state as a contribution, with its metrics; ClientProblem if it is nothing to give."""
    if len(samples.labels) < TRAINABLE:
        raise ClientProblem("too_few_samples", where="samples")
    if experiment.scenario.training.epochs and not trained.steps:
        raise ClientProblem("fewer samples than a batch, and training.batches = 'drop_last'", where="samples")
    if trained.steps and not (math.isfinite(trained.loss) and finite(state)):
        raise ClientProblem("training diverged: loss or weights are not finite; lower training.lr", where="training")
    metrics = {"loss": trained.loss} if trained.steps else {}
    return Contribution(state, experiment.weight(len(samples.labels))), metrics


def finite(tensors: Tensors) -> bool:
    """No NaN, no infinity, and nothing so large that its square is one."""
    return bool(torch.stack(torch._foreach_norm(list(tensors.values()))).isfinite().all())


def _fit(network: Network, own: Samples, task: Task, shared: Shared) -> Contribution:
    network.eval()
    with torch.no_grad():
        given = shared.experiment.method.fit(network, own, task, shared.stored.normalised)
    if not isinstance(given, Contribution):
        raise TypeError(f"the method's fit gave a {type(given).__name__}, not a fedcil.tensors.Contribution")
    if not (isinstance(given.weight, int | float) and WEIGHTS[0] <= given.weight <= WEIGHTS[1]):
        raise ClientProblem(f"a weight of {given.weight!r}, not of {WEIGHTS[0]:g} to {WEIGHTS[1]:g}", where="fit")
    if any(tensor.dtype in HALF for tensor in given.tensors.values()):
        raise ClientProblem("statistics in half precision, whose sums are wrong: make them float32", where="fit")
    if not all((tensor * (given.weight * HEADROOM)).isfinite().all() for tensor in given.tensors.values()):
        raise ClientProblem("what it measured is not finite, or too large to be summed", where="fit")
    return given


def _remember(job: Job, network: Network, own: Samples, task: Task, shared: Shared) -> tuple[str, int]:
    """The next version of what the client keeps: (hash, bytes)."""
    memory = shared.experiment.method.client_memory
    if memory is None:
        raise ClientProblem("this method keeps nothing on clients", where="state")
    kept = shared.kept(job)
    network.eval()
    with torch.no_grad():
        tensors = updated(memory.update(network, own, kept, task, shared.stored.normalised))
    return shared.states.save(tensors), count_bytes(tensors)


def _with_memory(own: Samples, job: Job, task: Task, shared: Shared) -> Samples:
    """Own samples, joined with what the client kept if the method keeps anything."""
    memory = shared.experiment.method.client_memory
    if memory is None:
        return own
    return joined(memory.join(own, shared.kept(job)), own, task)


def _augmented(shared: Shared, images: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
    mode = shared.experiment.scenario.data.augment
    return make_batch(images, index, mode, generator, shared.stored.mean, shared.stored.std)
