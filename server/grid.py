"""The port over Flower's Grid: stock simulation and real deployments alike."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedcil.errors import MessageRefused, TooFewClients
from fedcil.experiment import Experiment
from fedcil.gather import Gathered
from fedcil.hello import Share
from fedcil.messages import BORDER, Failure, Job, Outcome, Request
from fedcil.methods.base import Phase
from fedcil.packets import packet_of, packet_record
from fedcil.port import ClientDone, StopSignal, remaining
from fedcil.stream import Task
from fedcil.tensors import count_bytes, moved
from fedcil.wire import Expected, admit, pack_broadcast, pack_payload, place_of, spec_of
from server.mail import pull, push
from server.nodes import Nodes
from server.verdict import needed_answers

SHORTEST_POLL_S, LONGEST_POLL_S = 0.02, 0.5
MEET_S = 180.0  # how long the first round waits for enough clients
RETURN_S = 60.0  # how long another round does, where it has no deadline
ANSWER_OVERHEAD = 1 << 20  # bytes of an answer beyond its tensors

Sent = dict[str, tuple[int, tuple[Job, ...]]]
"""Messages under way: id -> (node, jobs)."""


class GridPort:
    """Clients are served by nodes, which come and go. ``known``: the shares of nodes met before, by node id.

    The first round waits for ``min_clients`` clients (0: all of them), every other one for a quorum, and so does, in
    the end, the first one of a run that goes on.
    """

    def __init__(
        self,
        grid: Grid,
        experiment: Experiment,
        run: str,
        stop: StopSignal,
        known: Mapping[str, Share] | None = None,
        min_clients: int = 0,
    ) -> None:
        self._grid = grid
        self._experiment = experiment
        self._run = run
        self._stop = stop
        scenario = experiment.scenario.to_dict()
        scenario["data"].pop("root", None)
        self._scenario = json.dumps(scenario)
        shares = {int(node): tuple(share) for node, share in (known or {}).items()}
        self._nodes = Nodes(grid, experiment, self._scenario, shares)
        self._serving: dict[int, int] = {}
        self._holds: dict[int, str] = {}  # node -> hash of the payload it was sent last
        count, server = experiment.scenario.clients.count, experiment.scenario.server
        self._first = min(min_clients or count, count)
        self._quorum = min(self._first, needed_answers(server.quorum, experiment.scenario.clients.per_round))
        self._least = self._quorum if shares else self._first
        self._met = False

    def reachable(self) -> frozenset[int]:
        """The clients whose nodes are here and owe nothing; waits a while for as many as a round needs."""
        if self._met:
            self._wait_for(self._quorum, self._experiment.scenario.server.deadline_s or RETURN_S)
        else:
            self._wait_for(self._first, MEET_S)
            self._refuse_too_few()
            self._met = True
        return frozenset(self._serving)

    def run(self, request: Request, deadline_s: float | None, done: ClientDone) -> Outcome:
        gathered, expected = Gathered(request, done), self._expected(request)
        lacking = set[int]()
        open_messages = self._send(request, lacking, gathered)
        started = time.monotonic()
        late = False
        while open_messages and not late:
            self._stop.check()
            late = remaining(deadline_s, started) == 0.0  # one more look: what has come by now is in time
            for reply in pull(self._grid, [*open_messages, *self._nodes.owed]):
                message = reply.metadata.reply_to_message_id
                if message not in open_messages:
                    self._nodes.paid(message)
                    continue
                node, jobs = open_messages.pop(message)
                if not reply.has_error() and "missing" in reply.content and node not in lacking:
                    lacking.add(node)  # answered once by sending the bytes
                    open_messages |= self._send(replace(request, jobs=jobs), lacking, gathered)
                else:
                    take(reply, jobs, expected, gathered)
            if open_messages and not late:
                pause(started)
        for message, (node, _) in open_messages.items():
            self._nodes.owe(message, node)
        return replace(gathered.outcome(), attendance=self._nodes.attendance())

    def close(self) -> None:
        """The runtime that lent the grid ends the nodes."""

    def _wait_for(self, clients: int, wait_s: float) -> None:
        """Look at the nodes until they serve so many clients, or the time is up."""
        started = time.monotonic()
        while True:
            self._stop.check()
            for reply in pull(self._grid, self._nodes.owed):
                self._nodes.paid(reply.metadata.reply_to_message_id)
            self._nodes.look()
            self._serving = self._nodes.serving()
            if len(self._serving) >= clients or time.monotonic() - started > wait_s:
                return
            pause(started)

    def _refuse_too_few(self) -> None:
        if len(self._serving) < self._least:
            raise TooFewClients(
                f"after {MEET_S:.0f} s {len(self._serving)} clients are served, {self._least} are needed "
                f"({self._nodes.counts()})",
                where="clients.count",
                next="start the missing nodes, then go on with the run",
            )

    def _send(self, request: Request, lacking: set[int], gathered: Gathered) -> Sent:
        """One message to each node, with all its jobs."""
        by_node: dict[int, list[Job]] = {}
        for job in request.jobs:
            by_node.setdefault(self._serving[job.client], []).append(job)
        payload = request.broadcast.payload
        shared = packet_record(pack_broadcast(request.broadcast, self._run))
        without = {node for node in by_node if payload and (node in lacking or self._holds.get(node) != payload.hash)}
        extra = {"payload": packet_record(pack_payload(payload))} if payload and without else {}
        messages = []
        for node, jobs in by_node.items():
            content = RecordDict({"broadcast": shared, "work": self._work(jobs)})
            if node in without:
                content.update(extra)
            gathered.wire_bytes += sum(part.count_bytes() for part in content.array_records.values())
            messages.append(Message(content, dst_node_id=node, message_type=MessageType.TRAIN))
        sent: Sent = {}
        for message, (node, jobs) in zip(push(self._grid, messages), by_node.items(), strict=True):
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
        phase = experiment.phases(task)[broadcast.phase]
        sent = experiment.sent(phase, task, broadcast.tensors)
        return Expected(
            run=self._run,
            place=place_of(broadcast),
            samples={job.client: int(counts[job.client]) for job in request.jobs},
            spec=spec_of(sent),
            limit=count_bytes(sent) + ANSWER_OVERHEAD,
            weights=known_weights(experiment, task, phase, request.jobs),
            start=moved(broadcast.tensors, torch.device("cpu")),  # as answers come
            rule=request.rule,
        )


def pause(started: float) -> None:
    """Between two looks: short at first, since simulated nodes answer at once; real ones take seconds."""
    waited = time.monotonic() - started
    time.sleep(min(LONGEST_POLL_S, max(SHORTEST_POLL_S, waited / 10)))


def known_weights(experiment: Experiment, task: Task, phase: Phase, jobs: Sequence[Job]) -> dict[int, float]:
    """Weights that the server knows beforehand: of models that were trained on a client's own samples alone."""
    if phase.work != "train" or experiment.method.client_memory is not None:
        return {}
    counts = experiment.counts(task)
    return {job.client: experiment.weight(int(counts[job.client])) for job in jobs}


def take(reply: Message, jobs: tuple[Job, ...], expected: Expected, gathered: Gathered) -> None:
    """All answers of one node, one by one through the border; an error counts for each of its jobs."""
    for job in jobs:
        if reply.has_error():
            reason = f"Flower error {reply.error.code}: {reply.error.reason}"
            gathered.fail(job.client, "node", reason)
        else:
            _take_one(reply.content.get(f"client-{job.client}"), job, expected, gathered)


def _take_one(record: object, job: Job, expected: Expected, gathered: Gathered) -> None:
    if record is None:
        return gathered.fail(job.client, "node", "no answer for this client")
    try:
        packet = packet_of(record)
        gathered.wire_bytes += len(packet)
        answer = admit(packet, job.client, expected)
    except MessageRefused as error:
        return gathered.fail(job.client, BORDER, error.what)
    if isinstance(answer.result, Failure):
        return gathered.fail(job.client, answer.result.stage, answer.result.reason)
    return gathered.answer(answer.result, answer.contribution)
