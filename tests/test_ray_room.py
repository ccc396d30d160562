"""What the Ray engine counts and says, without a cluster."""

from __future__ import annotations

import time
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from fedcil.engines import ray as engine
from fedcil.engines import ray_room
from fedcil.engines.workers import WorkerShare
from fedcil.errors import ScenarioError
from fedcil.gather import Gathered
from fedcil.messages import Broadcast, Request


@pytest.mark.parametrize(
    ("node", "share", "workers"),
    [
        ({"CPU": 5.0}, WorkerShare(2, 0.0), 2),
        ({"CPU": 8.0, "GPU": 2.0}, WorkerShare(1, 0.4), 4),  # two on each
        ({"CPU": 8.0, "GPU": 2.0}, WorkerShare(1, 0.5), 4),
        ({"CPU": 3.0, "GPU": 2.0}, WorkerShare(1, 0.1), 3),
        ({"CPU": 8.0, "GPU": 4.0}, WorkerShare(1, 2.0), 2),
        ({"CPU": 8.0}, WorkerShare(1, 0.5), 0),
        ({"memory": 1e9}, WorkerShare(1, 0.0), 0),
    ],
)
def test_a_worker_is_on_one_node_and_on_one_gpu(node: dict[str, float], share: WorkerShare, workers: int) -> None:
    assert ray_room.room_on(node, share) == workers


def test_what_two_nodes_have_left_over_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three CPUs each, workers with two threads: two workers, not three."""
    there = [{"Alive": True, "Resources": {"CPU": 3.0}}] * 2 + [{"Alive": False, "Resources": {"CPU": 9.0}}]
    monkeypatch.setattr(ray_room.ray, "nodes", lambda: there)
    assert ray_room.room(WorkerShare(2, 0.0)) == 2
    with pytest.raises(ScenarioError, match=r"3 workers with 2 CPUs .* do not fit into 3 \+ 3 CPUs and 0 \+ 0 GPUs"):
        ray_room.refuse_too_little(3, WorkerShare(2, 0.0))


def collected(error: RayError, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any], list[Any]]:
    """Who was dismissed, who is idle and who is asked again, after one of two workers did not say who it is."""

    def broken(_: object) -> None:
        raise error

    port: Any = engine.RayPort.__new__(engine.RayPort)
    dismissed: list[Any] = []
    asked: list[Any] = []
    idle: list[Any] = []
    port._crew = SimpleNamespace(workers=["here", "broken"], dismiss=dismissed.append)
    port._greet = asked.extend
    monkeypatch.setattr(engine.ray, "get", broken)
    request = Request(Broadcast(task=0, phase=0, round=0, tensors={}), (), 0)
    assert port._collect("answer", "broken", None, Gathered(request, lambda _: None), idle) == []
    return dismissed, idle, asked


def test_a_worker_that_cannot_say_who_it_is_gets_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RayTaskError("identity", "Traceback:\n  File ...\nOSError: its disk is gone", OSError())
    with pytest.warns(UserWarning, match="goes on without one of its workers: .* its disk is gone"):
        assert collected(error, monkeypatch) == (["broken"], [], [])


def test_a_worker_that_memory_was_short_for_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert collected(OutOfMemoryError("the node ran low"), monkeypatch) == ([], [], ["broken"])


def test_a_long_lull_is_said_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python shows a warning in the same words once."""
    monkeypatch.setattr(engine, "START_S", 0.01)
    monkeypatch.setattr(engine, "free_cpus", lambda: "0 of 1 CPUs are free")
    lull = engine.Lull()
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(3):
            time.sleep(0.02)
            lull.look(working=False)
        lull.look(working=True)
        lull.look(working=False)
    assert [str(warning.message).split(" s (")[0] for warning in shown] == [
        f"no Ray worker has been there for {seconds}" for seconds in ("0.01", "0.02", "0.03")
    ]
