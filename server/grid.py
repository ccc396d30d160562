"""The port over Flower's Grid: stock simulation and real deployments alike."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedcil.errors import MessageRefused, TooFewClients
from fedcil.experiment import Experiment
from fedcil.gather import Gathered
from fedcil.messages import BORDER, Failure, Job, Outcome, Request
from fedcil.port import ClientDone, StopSignal, remaining
from fedcil.stream import Task
from fedcil.wire import Expected, Spec, admit, pack_broadcast, pack_payload, place_of, spec_of

POLL_S = 0.05
MEET_S = 120.0  # how long to wait until every client has a node
ANSWER_OVERHEAD = 1 << 20  # bytes of an answer beyond its tensors


class GridPort:
    """Clients are served by nodes: node i of n serves the clients i, i + n, i + 2 n, ..."""

    def __init__(self, grid: Grid, experiment: Experiment, run: str, stop: StopSignal) -> None:
        self._grid = grid
        self._experiment = experiment
        self._run = run
        self._stop = stop
        scenario = experiment.scenario.to_dict()
        scenario["data"].pop("root", None)
        self._scenario = json.dumps(scenario)
        self._node_of = self._meet(MEET_S)
        self._holds: dict[int, str] = {}  # node -> hash of the payload it was sent last
        self._late: set[str] = set()  # messages whose round is over

    def reachable(self) -> frozenset[int]:
        return frozenset(self._node_of)

    def run(self, request: Request, deadline_s: float | None, done: ClientDone) -> Outcome:
        gathered, expected = Gathered(request, done), self._expected(request)
        started, lacking = time.monotonic(), set[int]()
        open_messages = self._send(request, lacking, gathered)
        while open_messages and remaining(deadline_s, started) != 0.0:
            self._stop.check()
            for reply in self._grid.pull_messages([*open_messages, *self._late]):
                message = reply.metadata.reply_to_message_id
                if message in self._late:  # pulled, so that it does not stay in Flower's state
                    self._late.discard(message)
                    continue
                if message not in open_messages:
                    continue  # its answer came twice
                node, jobs = open_messages.pop(message)
                if not reply.has_error() and "missing" in reply.content and node not in lacking:
                    lacking.add(node)  # answered once by sending the bytes
                    open_messages |= self._send(replace(request, jobs=jobs), lacking, gathered)
                else:
                    take(reply, jobs, expected, gathered)
            time.sleep(POLL_S)
        self._late |= open_messages.keys()
        return gathered.outcome()

    def close(self) -> None:
        """The runtime that lent the grid ends the nodes."""

    def _meet(self, wait_s: float) -> dict[int, int]:
        """Ask each node once for its share, until every client has a node; returns client -> node."""
        started, met = time.monotonic(), set[int]()
        clients: dict[int, int] = {}
        count = self._experiment.scenario.clients.count
        while len(clients) < count:
            new = sorted(set(self._grid.get_node_ids()) - met)
            met |= set(new)
            clients |= self._ask_shares(new, count, wait_s) if new else {}
            self._stop.check()
            if time.monotonic() - started > wait_s:
                raise TooFewClients(
                    f"after {wait_s:.0f} s {len(met)} nodes serve {len(clients)} of {count} clients",
                    where="clients.count",
                    next="start the missing nodes",
                )
            time.sleep(POLL_S)
        return clients

    def _ask_shares(self, nodes: list[int], count: int, wait_s: float) -> dict[int, int]:
        asked = [Message(RecordDict({}), dst_node_id=node, message_type="query.hello") for node in nodes]
        ids = list(self._grid.push_messages(asked))
        node_of_message = dict(zip(ids, nodes, strict=True))
        clients: dict[int, int] = {}
        for reply in self._pull_all(ids, wait_s):
            node = node_of_message[reply.metadata.reply_to_message_id]
            try:
                share = reply.content["hello"]
                served = range(int(share["partition"]), count, int(share["partitions"]))
            except (KeyError, TypeError, ValueError):
                continue  # a node that does not speak our language serves nobody
            clients.update((client, node) for client in served)
        return clients

    def _pull_all(self, ids: list[str], wait_s: float) -> list[Message]:
        """The answers that come within ``wait_s`` and are no errors."""
        left, replies, started = set(ids), [], time.monotonic()
        while left and time.monotonic() - started < wait_s:
            self._stop.check()
            for reply in self._grid.pull_messages(list(left)):
                left.discard(reply.metadata.reply_to_message_id)
                replies += [] if reply.has_error() else [reply]
            time.sleep(POLL_S)
        return replies

    def _send(self, request: Request, lacking: set[int], gathered: Gathered) -> dict[str, tuple[int, tuple[Job, ...]]]:
        """One message to each node, with all its jobs; returns message id -> (node, jobs)."""
        by_node: dict[int, list[Job]] = {}
        for job in request.jobs:
            by_node.setdefault(self._node_of[job.client], []).append(job)
        payload = request.broadcast.payload
        shared = _record(pack_broadcast(request.broadcast, self._run, request.cohort))
        extra = {"payload": _record(pack_payload(payload))} if payload else {}
        messages = []
        for node, jobs in by_node.items():
            content = RecordDict({"broadcast": shared, "work": self._work(jobs)})
            if payload and (node in lacking or self._holds.get(node) != payload.hash):
                content.update(extra)
            gathered.wire_bytes += sum(part.count_bytes() for part in content.array_records.values())
            messages.append(Message(content, dst_node_id=node, message_type=MessageType.TRAIN))
        ids = self._grid.push_messages(messages)
        sent: dict[str, tuple[int, tuple[Job, ...]]] = {}
        for message, (node, jobs) in zip(ids, by_node.items(), strict=True):
            if message:
                sent[message] = (node, tuple(jobs))
                self._holds |= {node: payload.hash} if payload else {}
            else:
                for job in jobs:
                    gathered.fail(job.client, "push", "its node could not be sent a message")
        return sent

    def _work(self, jobs: list[Job]) -> ConfigRecord:
        plain = [[job.client, job.position, job.state] for job in jobs]
        return ConfigRecord({"scenario": self._scenario, "jobs": json.dumps(plain)})

    def _expected(self, request: Request) -> Expected:
        """What the border lets through in this round."""
        experiment, broadcast = self._experiment, request.broadcast
        task = experiment.stream.tasks[broadcast.task]
        counts = experiment.counts(task)
        spec = contribution_spec(experiment, task, broadcast.phase, spec_of(broadcast.tensors))
        elements = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in (spec or {}).values())
        return Expected(
            run=self._run,
            place=place_of(broadcast),
            jobs={job.client: job for job in request.jobs},
            samples={job.client: int(counts[job.client]) for job in request.jobs},
            spec=spec,
            limit=elements + ANSWER_OVERHEAD,
            weights=known_weights(experiment, task, request),
            start=broadcast.tensors,
            rule=request.rule,
        )


def known_weights(experiment: Experiment, task: Task, request: Request) -> dict[int, float]:
    """Weights that the server knows beforehand: of models that were trained on a client's own samples alone."""
    kind = experiment.method.phases(task, experiment.scenario.training.rounds)[request.broadcast.phase]
    if kind.work != "train" or experiment.method.client_memory is not None:
        return {}
    uniform, counts = experiment.scenario.server.weighting == "uniform", experiment.counts(task)
    return {job.client: 1.0 if uniform else float(counts[job.client]) for job in request.jobs}


def contribution_spec(experiment: Experiment, task: Task, phase: int, model: Spec) -> Spec | None:
    """What a contribution of this phase looks like: the model, or what ``fit`` gives for no samples at all."""
    kind = experiment.method.phases(task, experiment.scenario.training.rounds)[phase]
    if kind.work == "train":
        return model
    if kind.work == "remember":
        return None
    return spec_of(experiment.statistics(task))


def take(reply: Message, jobs: tuple[Job, ...], expected: Expected, gathered: Gathered) -> None:
    """All answers of one node, one by one through the border; an error counts for each of its jobs."""
    for job in jobs:
        if reply.has_error():
            reason = f"Flower error {reply.error.code}: {reply.error.reason}"
            gathered.fail(job.client, "node", reason)
        else:
            _take_one(reply.content.get(f"client-{job.client}"), job, expected, gathered)


def _take_one(record: ArrayRecord | None, job: Job, expected: Expected, gathered: Gathered) -> None:
    if record is None:
        return gathered.fail(job.client, "node", "no answer for this client")
    try:
        packet = packet_of(record)
        gathered.wire_bytes += len(packet)
        answer = admit(packet, replace(expected, jobs={job.client: job}))
    except MessageRefused as error:
        return gathered.fail(job.client, BORDER, error.what)
    if isinstance(answer.result, Failure):
        return gathered.fail(job.client, answer.result.stage, answer.result.reason)
    return gathered.answer(answer.result, answer.contribution)


def packet_of(record: object) -> bytes:
    """The bytes in a record. MessageRefused if it is not one array of them."""
    try:
        (array,) = record.to_numpy_ndarrays()  # type: ignore[attr-defined]
        content: bytes = array.tobytes()
    except Exception as error:  # whatever a foreign record can raise
        raise MessageRefused(f"not a packet: {type(error).__name__}") from None
    return content


def _record(packet: bytes) -> ArrayRecord:
    return ArrayRecord([np.frombuffer(packet, dtype=np.uint8)])
