"""The inline engine: deadlines, and clients that break."""

from __future__ import annotations

import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fedcil
from fedcil.errors import RunFailed, TooFewClients
from fedcil.methods.base import Batch, Draws, Method, Phase, Prepared, Samples
from fedcil.methods.settings import MethodSettings
from fedcil.models.network import Network
from fedcil.stream import Task
from fedcil.tensors import Contribution

HOLD = threading.Event()


class Slow(MethodSettings):
    """Every step of the clients with an odd number of samples, or of the others, takes ``seconds``."""

    seconds: float = 0.0
    odd: bool = True
    breaks: bool = False
    exits: bool = False
    hangs: bool = False

    def build(self) -> Method:
        def loss(model: Network, prepared: Prepared, batch: Batch, draws: Draws) -> Tensor:
            if len(batch.labels) % 2 == self.odd:
                if self.breaks:
                    raise ValueError("this client is broken")
                if self.exits:
                    sys.exit("this client leaves")
                if self.hangs:
                    HOLD.wait()
                time.sleep(self.seconds)
            return torch.nn.functional.cross_entropy(model(batch.images), batch.labels)

        return Method(loss=loss)


def scenario(**method: Any) -> dict[str, Any]:
    """Four clients share 30 samples per task: 8, 8, 7 and 7, a batch each."""
    return {
        "data": {"name": "synthetic", "classes": 4, "samples_per_class": 15},
        "stream": {"tasks": 2},
        "partition": {"name": "iid"},
        "clients": {"count": 4, "per_round": 4},
        "model": {"name": "cnn", "width": 4},
        "method": {"name": f"{__name__}:Slow", **method},
        "training": {"rounds": 1, "epochs": 3, "batch_size": 8},
    }


@pytest.mark.parametrize("engine", ["workers=1", "workers=2"])
def test_who_is_late_is_not_waited_for(engine: str, tmp_path: Path) -> None:
    """A slow client would take 3 x 2 seconds; the round ends at its deadline and goes on without it."""
    sets = [f"engine={{{engine}}}", "server.deadline_s=0.7"]
    started = time.monotonic()
    run = fedcil.run(scenario(seconds=2.0), overrides=sets, output=tmp_path, figures=False)
    assert time.monotonic() - started < 10
    rounds = run.kind("round")
    assert {failure["stage"] for line in rounds for failure in line["failures"]} == {"deadline"}
    assert all(set(line["answered"]) <= {0, 1} for line in rounds)


@pytest.mark.slow
def test_who_was_late_is_asked_last(tmp_path: Path) -> None:
    """Of four clients the first two hold the only worker, one in a round, and then the others have it before them."""
    plain = scenario(seconds=0.4, odd=False) | {"training": {"rounds": 3, "epochs": 10, "batch_size": 8}}
    sets = ["engine={workers=1}", "server.deadline_s=3", "data.classes=2", "stream.tasks=1"]
    rounds = fedcil.run(plain, overrides=sets, output=tmp_path, figures=False).kind("round")
    assert [line["answered"] for line in rounds] == [[], [], [2, 3]]


def test_a_method_that_breaks_every_client_is_named(tmp_path: Path) -> None:
    plain = scenario(breaks=True) | {"clients": {"count": 2, "per_round": 2}}
    with pytest.raises(RunFailed, match=r"this client is broken .*test_inline\.py"):
        fedcil.run(plain, output=tmp_path, figures=False)


def test_a_broken_client_is_a_failure_and_the_round_goes_on(tmp_path: Path) -> None:
    run = fedcil.run(scenario(breaks=True), output=tmp_path, figures=False)
    for line in run.kind("round"):
        assert line["answered"] == [0, 1]
        assert [failure["client"] for failure in line["failures"]] == [2, 3]
        assert "this client is broken" in line["failures"][0]["reason"]
        assert line["status"] == "ok"


@pytest.mark.parametrize(
    "engine",
    [
        "workers=1",
        "workers=2, processes=false",
        pytest.param("workers=2, processes=true", marks=pytest.mark.slow),
    ],
)
def test_a_client_that_exits_is_a_failure_and_does_not_end_the_run_in_silence(engine: str, tmp_path: Path) -> None:
    sets = [f"engine={{{engine}}}", "training.rounds=2"]
    run = fedcil.run(scenario(exits=True), overrides=sets, output=tmp_path, figures=False)
    assert [line["answered"] for line in run.kind("round")] == [[0, 1]] * 4
    for line in run.kind("round"):
        assert {"SystemExit: this client leaves"} == {each["reason"].split(" (")[0] for each in line["failures"]}


class Statistics(MethodSettings):
    """Clients send what they have measured, and some of them, who have an odd number of images, something else."""

    wrong: str = ""

    def build(self) -> Method:
        def fit(network: Network, own: Samples, task: Task, images: Any) -> Contribution:
            odd = len(own.labels) % 2
            name = "b" if odd and self.wrong == "names" else "a"
            size = 3 if odd and self.wrong == "shapes" else 2
            value = float("nan") if odd and self.wrong == "nan" else 1.0
            kind = torch.float16 if self.wrong == "half" else torch.float32
            tensors = {} if odd and self.wrong == "nothing" else {name: torch.full((size,), value, dtype=kind)}
            return Contribution(tensors, 1.0)

        return Method(
            phases=lambda task, rounds: (Phase(name="statistics", rounds=rounds, work="fit"),),
            fit=fit,
            reduce=lambda state, phase, total: state,
        )


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("", ""),
        ("names", r"cannot be summed: clients give tensors of different names: \['a', 'b'\]"),
        ("shapes", r"cannot be summed: clients give tensors of different shapes: \['a'\]"),
        ("nothing", "cannot be summed: a client gives no tensors"),
    ],
)
@pytest.mark.parametrize("engine", ["workers=1", "workers=2, processes=true"])
def test_contributions_that_do_not_fit_together_end_the_run_with_a_reason(
    wrong: str, says: str, engine: str, tmp_path: Path
) -> None:
    method = {"method": {"name": f"{__name__}:Statistics", "wrong": wrong}}
    begin = partial(fedcil.run, scenario() | method, overrides=[f"engine={{{engine}}}"], output=tmp_path, figures=False)
    if not wrong:
        assert len(begin().kind("round")) == 2
        return
    with pytest.raises(RunFailed, match=says):
        begin()


@pytest.mark.slow
def test_contributions_that_do_not_fit_end_no_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of several clients at once, summed there."""
    method = {"method": {"name": f"{__name__}:Statistics", "wrong": "shapes"}}
    sets = ["engine={workers=2, processes=true}", "clients.count=16", "clients.per_round=16"]
    with pytest.raises(RunFailed, match="of different shapes"):
        fedcil.run(scenario() | method, overrides=sets, output=tmp_path, figures=False)
    assert "Traceback" not in capfd.readouterr().err


def test_statistics_that_are_not_finite_are_their_client_s_failure(tmp_path: Path) -> None:
    method = {"method": {"name": f"{__name__}:Statistics", "wrong": "nan"}}
    run = fedcil.run(scenario() | method, output=tmp_path, figures=False)
    failures = [failure for line in run.kind("round") for failure in line["failures"]]
    reason = "what it measured is not finite, or too large to be summed"
    assert {(each["stage"], each["reason"]) for each in failures} == {("fit", reason)}
    assert all(line["status"] == "ok" and line["answered"] for line in run.kind("round"))


def test_statistics_in_half_precision_are_refused(tmp_path: Path) -> None:
    method = {"method": {"name": f"{__name__}:Statistics", "wrong": "half"}}
    with pytest.raises(TooFewClients, match="fit: statistics in half precision") as refused:
        fedcil.run(scenario() | method, overrides=["server.patience=1"], output=tmp_path, figures=False)
    assert "mend the method's fit" in refused.value.next


@pytest.mark.parametrize("odd", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_client_that_hangs_is_the_only_one_that_rounds_lose(workers: int, odd: bool, tmp_path: Path) -> None:
    """Two of four clients never come back: each takes a thread with it, another takes its place, and the run ends.
    Even from a network's first pass, where the global generator is its own.
    """
    sets = [f"engine.workers={workers}", "server.deadline_s=2", "stream.tasks=1", "data.classes=2", "training.rounds=4"]
    HOLD.clear()
    try:
        with pytest.warns(UserWarning, match="not asked while they hang in a step of an earlier round: clients "):
            run = fedcil.run(scenario(hangs=True, odd=odd), overrides=sets, output=tmp_path, figures=False)
    finally:
        HOLD.set()
    lines = run.kind("round")
    well = [0, 1] if odd else [2, 3]
    assert [line["answered"] for line in lines[2:]] == [well] * 2
    assert {failure["reason"] for failure in lines[-1]["failures"]} == {"still in a step of an earlier round"}
