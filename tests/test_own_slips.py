"""Slips in a method of one's own: each is said, by the name of the function that it is in, and none changes numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedcil
from fedcil.cli.forecast import forecast
from fedcil.cli.guard import stoppable
from fedcil.errors import FedcilError, RunFailed, ScenarioError
from fedcil.experiment import open_experiment
from fedcil.scenario_file import load_scenario

SCENARIO: dict[str, Any] = {
    "data": {"name": "synthetic", "classes": 4, "samples_per_class": 8},
    "stream": {"tasks": 2},
    "partition": {"name": "iid"},
    "clients": {"count": 2, "per_round": 2},
    "training": {"rounds": 1, "epochs": 1, "batch_size": 4},
    "method": {"name": "mine:Mine"},
}
KEEPER = """
import torch
from fedcil.methods.base import ClientMemory, Method, Phase, Samples
from fedcil.methods.settings import MethodSettings

def phases(task, rounds):
    return Phase(name="train", rounds=rounds), Phase(name="store", rounds=1, who="all", work="remember")

def join(own, kept):
    if kept is None:
        return own
    images, labels = torch.cat([own.images, kept["images"]]), torch.cat([own.labels, kept["labels"]])
    return {join}

def update(network, own, kept, task, images):
    new = dict(images=own.images[:2], labels=own.labels[:2])
    return {update}

class Mine(MethodSettings):
    def build(self):
        return Method(phases=phases, client_memory=ClientMemory(join=join, update=update))
"""
RIGHT = {"join": "Samples(images, labels)", "update": "new"}
Write = Callable[[str], Path]


def said(tmp_path: Path) -> str:
    """What ended the run, or why its clients failed."""
    try:
        run = fedcil.run(SCENARIO, output=tmp_path / "runs", figures=False)
    except FedcilError as error:
        return str(error)
    return " ".join(failure["reason"] for line in run.kind("round") for failure in line["failures"])


def test_a_memory_as_it_should_be(own_module: Write, tmp_path: Path) -> None:
    own_module(KEEPER.format(**RIGHT))
    assert fedcil.run(SCENARIO, output=tmp_path / "runs", figures=False).finished


@pytest.mark.parametrize(
    ("function", "given", "says"),
    [
        ("join", "None", "a NoneType, not a fedcil.methods.base.Samples"),
        ("join", "Samples(images / 255, labels)", "images float32 of shape (10, 8, 8, 1); stored ones are uint8"),
        ("join", "Samples(images[:, :4], labels)", "images uint8 of shape (10, 4, 8, 1); stored ones are uint8 of"),
        ("join", "Samples(images, own.labels)", "labels int64 of shape (8,) for 10 images; needed is int64, one"),
        ("join", "Samples(images, labels.int())", "labels int32 of shape (10,) for 10 images"),
        ("join", "Samples(images, labels + 1)", "labels outside 0 to 3, the classes seen"),
        ("update", "own", "a Samples, not tensors by their names"),
        ("update", "None", "a NoneType, not tensors by their names"),
        ("update", "dict(labels=own.labels.tolist())", "'labels' -> list, not a tensor by its name"),
    ],
)
def test_what_clients_keep(function: str, given: str, says: str, own_module: Write, tmp_path: Path) -> None:
    own_module(KEEPER.format(**RIGHT | {function: given}))
    assert f"the method's client_memory.{function} gave {says}" in said(tmp_path)


ANY = """
from fedcil.methods.base import Boundary, Method, Phase
from fedcil.methods.mfcl import MFCL
from fedcil.methods.settings import MethodSettings

def measured(task, rounds):
    return Phase(name="measure", rounds=1, who="all", work="fit"),

class Mine({base}):
    def build(self):
        return {built}
"""


@pytest.mark.parametrize(
    ("built", "says"),
    [
        ("Method(loss='abc')", "Method(loss='abc'): it must be a function"),
        ("Method(norm_updates=2)", "Method(norm_updates=2): it must be a function"),
        ("Method(phases=measured)", "phases has one of work 'fit', but there is no fit"),
        ("Method(loss=lambda model, batch: 0)", "takes 2 positional arguments but 4 were given (client/training.py:"),
        ("Method(loss=lambda model, *_: model(_[1].images).sum().detach())", "loss gave a number that does not depend"),
    ],
)
def test_functions_of_another_form(built: str, says: str, own_module: Write, tmp_path: Path) -> None:
    own_module(ANY.format(base="MethodSettings", built=built))
    assert says in said(tmp_path)


def test_statistics_that_are_none_are_not_taken_for_a_fit_that_fails(own_module: Write) -> None:
    own_module(ANY.format(base="MethodSettings", built="Method(phases=measured, fit=lambda *_: {})"))
    opened = open_experiment(load_scenario(SCENARIO))
    with pytest.raises(RunFailed, match="the method's fit returned dict, not a "):
        forecast(opened)


@pytest.mark.parametrize(
    ("name", "says", "way_out"),
    [
        ("mien:Mine", "module 'mien' cannot be imported", "the folder that the command is started in"),
        ("mine:Mien", "mine.py) has no 'Mien'", "the folder that the command is started in"),
        ("mine:Mine", "its class is derived from that of 'mfcl': give it a line `name: str`", ""),
    ],
)
def test_a_settings_class_that_cannot_be_had(name: str, says: str, way_out: str, own_module: Write) -> None:
    own_module(ANY.format(base="MFCL", built="super().build()"))
    with pytest.raises(ScenarioError) as caught:
        load_scenario(SCENARIO | {"method": {"name": name, "preset": "small"}})
    assert says in caught.value.what
    assert way_out in caught.value.next


def test_a_method_derived_from_a_shipped_one(own_module: Write, tmp_path: Path) -> None:
    source = ANY.format(base="MFCL", built="super().build()").replace("    def build", "    name: str\n\n    def build")
    own_module(source)
    method = {"name": "mine:Mine", "preset": "small", "steps": 2, "pool": 8, "generator_width": 8}
    run = fedcil.run(SCENARIO | {"method": method}, output=tmp_path / "runs", figures=False)
    assert run.scenario.method.name == "mine:Mine"


def test_a_payload_that_plan_cannot_know_is_said(own_module: Write) -> None:
    own_module(ANY.format(base="MethodSettings", built="Method(boundary=lambda state, *_: Boundary(state))"))
    (note,) = forecast(open_experiment(load_scenario(SCENARIO)))["notes"]
    assert note.startswith("what the boundary of 'mine:Mine' hands to clients is not counted")


WIDE = """
import numpy as np
from fedcil.data import Dataset, Split, digest_of

def load(section, root):
    split = Split(np.zeros((8, 1, 16, 1), dtype=np.uint8), np.arange(8) % 4)
    names, digest = tuple("abcd"), digest_of(split, split)
    return Dataset(name="mine", train=split, test=split, mean=(0.5,), std=(0.5,), class_names=names, digest=digest)
"""


def test_images_that_are_too_small_for_a_network_are_refused(own_module: Write) -> None:
    own_module(WIDE)
    wide = SCENARIO | {"data": {"name": "mine:load"}, "method": {"name": "fedavg"}}
    with pytest.raises(ScenarioError, match="images of 1 x 16 are too small for model"):
        open_experiment(load_scenario(wide))
    assert open_experiment(load_scenario(wide, ["model.name='resnet8'"])).first_state()


ENDED = """
import os, signal, time
from fedcil.cli.guard import ECHO_S
from fedcil.methods.base import Method
from fedcil.methods.settings import MethodSettings

def twice(where):
    if where == {where!r}:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(ECHO_S)

def load(section, root):
    twice("load")

def share(labels, clients, section, rng):
    twice("share")

class Mine(MethodSettings):
    def build(self):
        twice("build")
        return Method()

twice("import")
"""


@pytest.mark.parametrize(
    ("where", "tables"),
    [
        ("import", {}),
        ("build", {}),
        ("load", {"data": {"name": "mine:load"}}),
        ("share", {"partition": {"name": "mine:share"}}),
    ],
)
def test_a_second_ctrl_c_in_own_code_is_no_slip_of_it(where: str, tables: dict[str, Any], own_module: Write) -> None:
    own_module(ENDED.format(where=where))
    with pytest.raises(SystemExit) as caught, stoppable(None):
        open_experiment(load_scenario(SCENARIO | tables))
    assert caught.value.code == 130
