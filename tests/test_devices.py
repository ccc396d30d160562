"""Models and sums that come over a wire lie on the CPU, whatever the device of a run. The device here is meta, which
refuses, like a GPU, to compute with tensors of the CPU.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from client import handle as client
from fedcil.messages import Answer, Broadcast, Job, Outcome, Report, Request
from fedcil.rule import Rule
from fedcil.tensors import Contribution, Total
from server.session import Session

META = torch.device("meta")
MODEL = {"weight": torch.ones(3)}
BROADCAST = Broadcast(task=0, phase=0, round=0, tensors=MODEL)
JOBS = (Job(0, 0), Job(1, 1))


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its clients hand in what they were sent."""

    def give_back(round_: client.Round, job: Job) -> Answer:
        return Answer(Report(client=job.client, samples=1), Contribution(round_.broadcast.tensors, 1.0))

    monkeypatch.setattr(client, "do_job", give_back)
    monkeypatch.setattr(client, "try_at_once", lambda *_: [])
    experiment = SimpleNamespace(execution=SimpleNamespace(at_once=1))
    return SimpleNamespace(shared=SimpleNamespace(experiment=experiment, device=META))


def test_clients_start_from_the_model_on_their_device(worker: Any) -> None:
    for _, answer in client.do_jobs(client.Round.of(BROADCAST, worker), JOBS):
        assert answer.contribution is not None
        assert answer.contribution.tensors["weight"].device == META


def test_updates_are_measured_on_their_device(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``server.clip_norm``: from the model that was sent."""
    starts = []

    def admissible(contribution: Contribution, start: Any, _: Rule) -> Contribution:
        starts.append(contribution.tensors["weight"] - start["weight"])  # raises on two devices
        return contribution

    monkeypatch.setattr(client, "admissible", admissible)
    client.handle(Request(BROADCAST, JOBS, 2, Rule(clip_norm=1.0)), worker)
    assert [each.device for each in starts] == [META, META]


def test_the_round_loop_has_a_sum_on_its_device() -> None:
    def run(*_: object) -> Outcome:
        return Outcome(Total(MODEL, 2.0), (), ())

    session: Any = SimpleNamespace(
        port=SimpleNamespace(run=run),
        watcher=SimpleNamespace(client_done=None),
        experiment=SimpleNamespace(compute=SimpleNamespace(device=META)),
    )
    outcome = Session.ask(session, Request(BROADCAST, (), 0), None)
    assert outcome.total is not None
    assert outcome.total.tensors["weight"].device == META
    assert outcome.total.weight == 2.0
