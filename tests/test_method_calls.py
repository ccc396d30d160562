"""What a method's functions on the server raise or give wrongly ends the run with a reason; mended, it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_own_code import SCENARIO as SMALL
from torch import Tensor

import fedcil
from fedcil.errors import RunFailed, ScenarioError
from fedcil.keys import Key
from fedcil.messages import Payload
from fedcil.methods.base import (
    Boundary,
    Method,
    Notice,
    Phase,
    Progress,
    Samples,
    no_boundary,
    predict_with_head,
    replace_model,
)
from fedcil.methods.settings import MethodSettings
from fedcil.models.network import Network
from fedcil.state import ServerState
from fedcil.stream import Task
from fedcil.tensors import Contribution, Tensors, Total
from server.method_calls import not_finite

SCENARIO = SMALL | {"method": {"name": f"{__name__}:Breakable"}}
State = Callable[[ServerState], object]
WRONG: dict[str, Any] = {}
"""What a function does now instead of its work, by its name; a mended method has nothing here."""


@pytest.fixture(autouse=True)
def _well() -> None:
    WRONG.clear()


class Breakable(MethodSettings):
    """FedAvg with a memory."""

    def build(self) -> Method:
        return Method(reduce=reduce, boundary=boundary, predict=predict, **WRONG.get("method", {}))


def reduce(state: ServerState, phase: Phase, total: Total | None) -> Any:
    good = replace_model(replace(state, memory={"seen": torch.ones(2)}), phase, total)
    return WRONG["reduce"](good) if "reduce" in WRONG else good


def boundary(state: ServerState, task: Task, key: Key, compute: Any, progress: Progress) -> Any:
    made = no_boundary(state, task, key, compute, progress)
    return WRONG["boundary"](made) if "boundary" in WRONG else made


def predict(network: Network, memory: Tensors, images: Tensor) -> Any:
    scores = predict_with_head(network, memory, images)
    return WRONG["predict"](scores) if "predict" in WRONG else scores


def leave(_: object) -> None:
    raise SystemExit("enough")


def with_bias(made: Callable[[Tensor], object]) -> State:
    return lambda state: replace(state, model={**state.model, "head.bias": made(state.model["head.bias"])})


def without_bias(state: ServerState) -> ServerState:
    return replace(state, model={name: each for name, each in state.model.items() if name != "head.bias"})


REDUCE: dict[str, tuple[State, str]] = {
    "raises": (lambda state: 1 / 0, r"reduce raised ZeroDivisionError: .*\(test_method_calls.py:"),
    "exits": (leave, "reduce raised SystemExit: enough"),
    "nothing": (lambda state: None, "reduce returned NoneType, not a fedcil.state.ServerState"),
    "no model": (lambda state: replace(state, model=None), "reduce gave a model that is a NoneType"),
    "missing": (without_bias, r"reduce gave a model without \['head.bias'\]"),
    "more": (
        lambda state: replace(state, model={**state.model, "x": torch.ones(1)}),
        r"reduce gave a model with \['x'\]",
    ),
    "float64": (with_bias(Tensor.double), r"reduce gave head.bias as torch.float64 \(2,\), not torch.float32 \(2,\)"),
    "shape": (with_bias(lambda bias: bias[:1]), r"reduce gave head.bias as torch.float32 \(1,\), not"),
    "no tensor": (with_bias(Tensor.tolist), "reduce gave head.bias as a list"),
    "not finite": (with_bias(lambda bias: bias * float("nan")), "reduce gave head.bias that is not finite"),
    "memory": (lambda state: replace(state, memory=[1]), "reduce gave memory that is not tensors by name"),
    "memory of no tensors": (lambda state: replace(state, memory={"seen": 1}), "reduce gave memory that is not"),
    "memory not finite": (
        lambda state: replace(state, memory={"seen": torch.full((1,), float("inf"))}),
        "reduce gave seen that is not finite",
    ),
    "payload": (lambda state: replace(state, payload={}), "reduce gave a payload that is a dict"),
    "payload not finite": (
        lambda state: replace(state, payload=Payload.of({"seen": torch.full((1,), float("inf"))})),
        "reduce gave seen that is not finite",
    ),
    "payload by another name": (
        lambda state: replace(state, payload=Payload({"seen": torch.ones(1)}, "mine")),
        "reduce gave a payload under a name of its own: make it by fedcil.messages.Payload.of",
    ),
}
BOUNDARY: dict[str, tuple[Callable[[Boundary], object], str]] = {
    "raises": (lambda made: 1 / 0, "boundary raised ZeroDivisionError"),
    "exits": (leave, "boundary raised SystemExit: enough"),
    "a state": (lambda made: made.state, "boundary returned ServerState, not a fedcil.methods.base.Boundary"),
    "no state": (lambda made: Boundary(None), "boundary returned NoneType, not a fedcil.state.ServerState"),
    "missing": (lambda made: Boundary(without_bias(made.state)), "boundary gave a model without"),
    "warnings": (lambda made: Boundary(made.state, warnings=("vanished",)), "boundary gave warnings that are no"),
    "a label that is none": (
        lambda made: Boundary(made.state, warnings=(Notice("{classes}", (99,)),)),
        r"boundary gave Notice\(text='{classes}', labels=\(99,\)\), not a text with labels of 0 to 1",
    ),
    "a text that is none": (lambda made: Boundary(made.state, warnings=(Notice(None),)), r"gave Notice\(text=None"),
    "a log that is a list": (lambda made: Boundary(made.state, log=[1]), "boundary gave a log that is a list"),
}
PREDICT: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "raises": (lambda scores: 1 / 0, "predict raised ZeroDivisionError"),
    "exits": (leave, "predict raised SystemExit: enough"),
    "nothing": (lambda scores: None, "predict returned NoneType, not a torch.Tensor"),
    "not numbers": (lambda scores: scores * float("nan"), "predict gave scores that are not numbers"),
    "one of them": (
        lambda scores: scores.masked_fill(torch.eye(*scores.shape).bool(), float("nan")),
        "predict gave scores that are not numbers",
    ),
}
CASES = [
    pytest.param(function, *case, id=f"{function}: {name}")
    for function, cases in (("reduce", REDUCE), ("boundary", BOUNDARY), ("predict", PREDICT))
    for name, case in cases.items()
]


@pytest.mark.parametrize(("function", "wrong", "says"), CASES)
def test_what_is_wrong_is_said_and_mended_the_run_goes_on(
    function: str, wrong: Callable[[Any], Any], says: str, tmp_path: Path
) -> None:
    """To the numbers of a run that was never broken: nothing that was wrong is in a checkpoint."""
    whole = fedcil.run(SCENARIO, output=tmp_path / "whole", figures=False)
    WRONG[function] = wrong
    with pytest.raises(RunFailed, match=says) as caught:
        fedcil.run(SCENARIO, output=tmp_path / "runs", figures=False)
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"fedcil resume {folder}" in caught.value.next
    WRONG.clear()
    assert fedcil.resume(folder, figures=False).results == whole.results


def test_large_numbers_and_whole_ones_are_numbers() -> None:
    """Of which the squares are too large, of 64 bits beside 32, without any number, and of integers."""
    large = torch.full((3,), 1e30)
    memory = {"large": large, "double": large.double() ** 5, "none": torch.zeros(0), "counts": torch.ones(2).long()}
    before = ServerState(model={"x": torch.ones(1)})
    assert not_finite(replace(before, memory=memory), before) == []
    memory |= {"nan": torch.tensor([1.0, float("nan")]), "inf": torch.tensor([float("-inf")])}
    assert not_finite(replace(before, memory=memory), before) == ["nan", "inf"]


def test_scores_may_leave_classes_out(tmp_path: Path) -> None:
    """By a score of minus infinity."""
    WRONG["predict"] = lambda scores: scores.masked_fill(torch.eye(*scores.shape).bool(), float("-inf"))
    assert fedcil.run(SCENARIO, output=tmp_path, figures=False).finished


def fit(network: Network, samples: Samples, task: Task, images: Any) -> Any:
    given = Contribution({"sum": torch.ones(2)}, 1.0)
    return WRONG["fit"](given, len(samples.labels)) if "fit" in WRONG else given


def statistics(task: Task, rounds: int) -> tuple[Phase, ...]:
    return (Phase(name="statistics", rounds=1, work="fit"),)


def test_statistics_need_a_reduce_of_their_own(tmp_path: Path) -> None:
    WRONG["method"] = {"fit": fit, "phases": statistics}
    with pytest.raises(RunFailed, match=r"a model without .*a phase without local training needs a reduce of its own"):
        fedcil.run(SCENARIO | {"method": {"name": f"{__name__}:Forgetful"}}, output=tmp_path, figures=False)


class Forgetful(MethodSettings):
    def build(self) -> Method:
        return Method(**WRONG["method"])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda given, count: None, "the method's fit gave a NoneType, not a fedcil.tensors.Contribution"),
        (lambda given, count: replace(given, weight=-1.0), "a weight of -1.0, not of 1e-09 to 1e+15"),
        (lambda given, count: replace(given, weight=float("nan")), "a weight of nan, not of"),
        (lambda given, count: replace(given, weight="1"), "a weight of '1', not of"),
    ],
)
def test_a_contribution_that_is_none_is_its_client_s_failure(
    wrong: Callable[[Contribution, int], Any], says: str, tmp_path: Path
) -> None:
    """Who has five samples gives it; the other one has four."""
    keep = {"reduce": lambda state, phase, total: state}
    WRONG["method"] = {"fit": fit, "phases": statistics, **keep}
    WRONG["fit"] = lambda given, count: wrong(given, count) if count == 5 else given
    tables = {
        "method": {"name": f"{__name__}:Forgetful"},
        "data": {"name": "synthetic", "classes": 2, "samples_per_class": 9},
        "stream": {"tasks": 1},
        "clients": {"count": 4, "per_round": 4},
    }
    run = fedcil.run(SCENARIO | tables, output=tmp_path, figures=False)
    (line,) = run.kind("round")
    assert line["status"] == "ok"
    assert all(says in failure["reason"] for failure in line["failures"])
    assert line["failures"]
    assert line["answered"]


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"phases": lambda task, rounds: (Phase(name="a", rounds=1.5),)}, "phases gave one of 1.5 rounds"),
        ({"phases": leave}, "TypeError"),
        ({"norm_updates": lambda task: -1}, "norm_updates gave -1, not a whole number from 0 on"),
        ({"norm_updates": lambda task: "a"}, "norm_updates gave 'a', not a whole number"),
    ],
)
def test_what_can_be_asked_before_a_run_is(method: dict[str, Any], says: str, tmp_path: Path) -> None:
    WRONG["method"] = method
    with pytest.raises(ScenarioError, match=says):
        fedcil.run(SCENARIO, output=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
