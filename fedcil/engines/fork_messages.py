"""What a run and its worker processes say to each other: requests one way, replies the other."""

from __future__ import annotations

from dataclasses import asdict, astuple

from fedcil.engines.channel import Channel
from fedcil.engines.flat import report_of_row, row_of_job, row_of_report
from fedcil.engines.workers import CpuSeconds
from fedcil.errors import LABELS
from fedcil.fold import Fold, Interval, Misfit
from fedcil.messages import Broadcast, Failure, Job, Payload, Reply, Request
from fedcil.rule import Rule
from fedcil.tensors import Total
from fedcil.wire import place_of


class Asking:
    """The run's end: a broadcast goes with the first request of a round, a payload with the first of a task."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._broadcast: Broadcast | None = None
        self._payload: str | None = None

    def send(self, request: Request) -> None:
        broadcast, groups = request.broadcast, []
        if broadcast is not self._broadcast:
            groups.append(broadcast.tensors)
            if broadcast.payload and broadcast.payload.hash != self._payload:
                groups.append(broadcast.payload.tensors)
        self._broadcast, self._payload = broadcast, broadcast.payload.hash if broadcast.payload else None
        header = {
            "place": place_of(broadcast),
            "payload": self._payload,
            "jobs": [row_of_job(job) for job in request.jobs],
            "cohort": request.cohort,
            "rule": asdict(request.rule),
        }
        self._channel.send(header, *groups)

    def receive(self, wait_s: float) -> Reply:
        """The answer to the request. TimeoutError if it does not come within this time; Misfit if that was it."""
        header, groups = self._channel.receive(wait_s, copied=True)
        if "misfit" in header:
            raise Misfit(**header["misfit"])
        sums: dict[Interval, Total | None] = dict.fromkeys(map(tuple, header["absent"]))
        for (level, index, weight), tensors in zip(header["sums"], groups, strict=True):
            sums[level, index] = Total(tensors, weight)
        reports = tuple(map(report_of_row, header["reports"]))
        failures = tuple(Failure(*row) for row in header["failures"])
        return Reply(Fold(header["leaves"], sums, own=set(sums)), reports, failures, header["cpu_seconds"])


class Answering:
    """The worker's end. A request's tensors lie in the run's memory, which is left alone until the worker answers."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._broadcast = Broadcast(task=0, phase=0, round=0, tensors={})
        self._payload: Payload | None = None
        self._cpu = CpuSeconds()

    def receive(self) -> Request:
        header, groups = self._channel.receive()
        if groups:
            model, *payload = groups
            if payload:  # it is needed for as long as the task
                self._payload = Payload({name: view.clone() for name, view in payload[0].items()}, header["payload"])
            task, phase, round_ = header["place"]
            held = self._payload if header["payload"] else None
            self._broadcast = Broadcast(task=task, phase=phase, round=round_, tensors=model, payload=held)
        jobs = tuple(Job(*row) for row in header["jobs"])
        return Request(self._broadcast, jobs, header["cohort"], Rule(**header["rule"]))

    def send_misfit(self, misfit: Misfit) -> None:
        """Which is no worker's problem, but the round's."""
        words = misfit.as_dict()
        self._channel.send({"misfit": {key: words[key] for key in ("what", *LABELS)}})

    def send(self, reply: Reply) -> None:
        """With what it took this process since its last reply."""
        given = {node: total for node, total in reply.fold.sums.items() if total}
        header = {
            "leaves": reply.fold.leaves,
            "sums": [[*node, total.weight] for node, total in given.items()],
            "absent": [list(node) for node, total in reply.fold.sums.items() if not total],
            "reports": [row_of_report(report) for report in reply.reports],
            "failures": [astuple(failure) for failure in reply.failures],
            "cpu_seconds": self._cpu.since_last(),
        }
        self._channel.send(header, *(total.tensors for total in given.values()))
