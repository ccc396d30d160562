"""A person's own modules: what is wrong in them is said before a run, and a change of them is not overlooked."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedcil
from fedcil.cli.forecast import forecast
from fedcil.errors import NotResumable, RunFailed, ScenarioError
from fedcil.experiment import open_experiment
from fedcil.record.compare import differences, grouped
from fedcil.record.report import write_report
from fedcil.scenario_file import load_scenario
from fedcil.sources import program

SCENARIO: dict[str, Any] = {
    "data": {"name": "synthetic", "classes": 4, "samples_per_class": 8},
    "stream": {"tasks": 2},
    "partition": {"name": "iid"},
    "clients": {"count": 2, "per_round": 2},
    "training": {"rounds": 2, "epochs": 1, "batch_size": 4},
    "method": {"name": "mine:Mine"},
}
SOURCE = """
import torch
from collections.abc import Callable
from fedcil.losses import *
from fedcil.methods.base import Boundary, Method, Phase
from fedcil.methods.settings import MethodSettings

class Mine(MethodSettings):
    how: Callable[[int], int] | None = None  # no JSON schema has a word for it
    many: int = 1

    def build(self):
        return {}
"""
GOOD = "Method()"


@pytest.fixture
def mine(own_module: Callable[[str], Path]) -> Callable[[str], Path]:
    """Writes the module whose method ``build`` returns what is given."""
    return lambda built: own_module(SOURCE.format(built))


@pytest.mark.parametrize(
    ("built", "says"),
    [
        ("None", "build() gave NoneType, not a fedcil.methods.base.Method"),
        ("Method(phases=lambda task, rounds: ())", "phases gave none for a task"),
        ("Method(data='everything')", "allowed are 'task', 'so_far'"),
        ("Method(nothing=1)", "unexpected keyword argument 'nothing' (mine.py:"),
        ("Method(phases=lambda task, rounds: Phase(name='a', rounds=1))", "phases gave Phase(name='a', rounds=1"),
        ("Method(phases=lambda task, rounds: (1,))", "phases gave (1,), not a tuple of fedcil.methods.base.Phase"),
        (
            "Method(phases=lambda task, rounds: [Phase(name='a', rounds=1, work='trains')])",
            "Phase(work='trains'); allowed: train, ",
        ),
        ("Method(phases=lambda task, rounds: [Phase(name='a', rounds=0)])", "Phase(rounds=0); allowed: 1 or more"),
        (
            "Method(phases=lambda task, rounds: [Phase(name='a', rounds=1, work='remember')])",
            "but there is no client_memory",
        ),
    ],
)
def test_what_is_no_method_is_said_before_a_run(built: str, says: str, mine: Any, tmp_path: Path) -> None:
    mine(built)
    with pytest.raises(ScenarioError) as caught:
        fedcil.run(SCENARIO, output=tmp_path / "runs")
    assert says in caught.value.what
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("built", "says"),
    [
        ("lambda model, *_: model(_[1].images).sum(1)", "gave a Tensor of shape (4,); it must be a scalar tensor"),
        ("lambda *_: 1.0", "gave a float; it must"),
    ],
)
def test_a_loss_that_is_none_is_said(built: str, says: str, mine: Any, tmp_path: Path) -> None:
    mine(f"Method(loss={built})")
    with pytest.raises(RunFailed) as caught:
        fedcil.run(SCENARIO, output=tmp_path / "runs", figures=False)
    assert f"TypeError: the method's loss {says}" in str(caught.value)


def test_options_of_any_type_do_no_harm(mine: Any, tmp_path: Path) -> None:
    """Not to a run, and not to an error about another option."""
    mine(GOOD)
    assert fedcil.run(SCENARIO, output=tmp_path / "runs", figures=False).finished
    with pytest.raises(ScenarioError, match=r"method.many = 'x' must be a valid integer"):
        fedcil.run(SCENARIO | {"method": {"name": "mine:Mine", "many": "x"}}, output=tmp_path / "more")


FIT = """
from fedcil.tensors import Contribution
from fedcil.state import ServerState

def fit(network, samples, task, images):
    features = network.features(images(samples.images))
    assert not network.training and not features.requires_grad
    return Contribution({"sum": features.sum(0)}, float(len(samples.labels)))

def method():
    statistics = lambda task, rounds: (Phase(name="statistics", rounds=1, work="fit"),)
    return Method(phases=statistics, fit=fit, reduce=lambda state, phase, total: state)
"""


def test_statistics_of_features_run_and_can_be_planned(mine: Any, tmp_path: Path) -> None:
    """What a client would send is asked for with no samples, in the form of samples."""
    folder = mine("method()")
    with (folder / "mine.py").open("a") as module:
        module.write(FIT)
    assert fedcil.run(SCENARIO, output=tmp_path / "runs", figures=False).finished
    forecast(open_experiment(load_scenario(SCENARIO)))


def test_statistics_that_need_a_sample_are_said(mine: Any) -> None:
    folder = mine("method()")
    with (folder / "mine.py").open("a") as module:
        module.write(FIT.replace("features.sum(0)", "features.reshape(len(features), -1).sum(0)"))
    with pytest.raises(ScenarioError, match=r"fit fails for no samples.*cannot reshape.*\(mine.py:"):
        forecast(open_experiment(load_scenario(SCENARIO)))


def test_an_option_of_several_numbers_is_a_list_in_a_file(mine: Any, tmp_path: Path) -> None:
    folder = mine(GOOD)
    source = (folder / "mine.py").read_text()
    (folder / "mine.py").write_text(source.replace("many: int = 1", "many: tuple[tuple[int, int], ...] = ((1, 2),)"))
    run = fedcil.run(SCENARIO, output=tmp_path / "runs", figures=False)
    assert run.scenario.method.many == ((1, 2),)
    given = load_scenario(SCENARIO, ["method.many=[[3, 4], [5, 6]]"])
    assert given.method.many == ((3, 4), (5, 6))


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("list[int | None] = [1, None]", "NoneType"),  # TOML has no word for nothing
        ("Path = Path('a')", "method.many = 'a' must be"),
        ("frozenset[int] = frozenset((1,))", r"method.many = \[1\] must be"),
    ],
)
def test_an_option_that_cannot_be_kept_in_the_folder_leaves_none_behind(
    option: str, says: str, mine: Any, tmp_path: Path
) -> None:
    folder = mine(GOOD)
    source = (folder / "mine.py").read_text()
    (folder / "mine.py").write_text("from pathlib import Path\n" + source.replace("many: int = 1", f"many: {option}"))
    with pytest.raises(ScenarioError, match=rf"cannot be written into the run folder: .*{says}"):
        fedcil.run(SCENARIO, output=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_scores_of_another_shape_end_the_run(mine: Any, tmp_path: Path) -> None:
    mine("Method(predict=lambda network, memory, images: network(images)[:, :1])")
    with pytest.raises(RunFailed, match=r"predict gave scores of shape \(\d+, 1\), not .*: \(images, classes seen\)"):
        fedcil.run(SCENARIO, output=tmp_path / "runs", figures=False)


@pytest.mark.parametrize(
    ("built", "says"),
    [
        ("Method(reduce=lambda state, phase, total: None)", "reduce returned NoneType, not a fedcil.state.ServerState"),
        (
            "Method(boundary=lambda state, *_: state)",
            "boundary returned ServerState, not a fedcil.methods",
        ),
    ],
)
def test_what_a_method_must_return_is_said_where_it_returns_something_else(
    built: str, says: str, mine: Any, tmp_path: Path
) -> None:
    mine(built)
    with pytest.raises(RunFailed, match=f"the method's {says}"):
        fedcil.run(SCENARIO, output=tmp_path / "runs", figures=False)


def command(folder: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    tables = ["data={name='synthetic', classes=4, samples_per_class=8}", "method={name='mine:Mine'}", "stream.tasks=2"]
    tables += ["clients={count=2, per_round=2}"]
    sets = [*tables, "training.rounds=1", "training.epochs=1"]
    words = [part for text in sets for part in ("--set", text)]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "fedcil",
            "run",
            "digits_fedavg",
            *words,
            "--no-figures",
            "--output",
            str(output),
            *more,
        ],
        cwd=folder,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_finished_run_of_other_code_is_not_taken_for_this_one(mine: Any, tmp_path: Path) -> None:
    """Not by ``run``, and in a comparison it is no second run of the same."""
    folder, output = mine(GOOD), tmp_path / "runs"
    assert "finished already" not in command(folder, output, "--seeds", "0").stderr
    assert "finished already" in command(folder, output, "--seeds", "0").stderr
    mine("Method(loss=lambda model, prepared, batch, draws: 0 * model(batch.images).sum())")
    assert "finished already" not in command(folder, output, "--seeds", "0").stderr
    groups = grouped([fedcil.load(path) for path in sorted(output.iterdir())])
    assert len(groups) == 2
    assert any(note.startswith("mine.py differs") for note in differences(groups))


def test_a_run_that_goes_on_with_other_code_says_so(mine: Any, tmp_path: Path) -> None:
    folder, output = mine(GOOD), tmp_path / "runs"
    assert command(folder, output).returncode == 0
    (run,) = output.iterdir()
    (run / "summary.json").unlink()  # as if it had been killed at the very end
    mine("Method(loss=lambda model, prepared, batch, draws: 0 * model(batch.images).sum())")
    with pytest.warns(UserWarning, match="mine changed since this run began"):
        fedcil.resume(run, figures=False)
    for built in (GOOD, "Method(loss=lambda model, prepared, batch, draws: 0 * model(batch.images).sum())"):
        mine(built)
        assert "finished already" not in command(folder, output, "--seeds", "0").stderr  # it is by neither of the two
    mixed, *pure = (fedcil.load(path) for path in sorted(output.iterdir()))
    assert mixed.own_code["mine"] == "+".join(other.own_code["mine"] for other in pure)
    assert len(grouped([mixed, *pure])) == 3


def test_a_run_can_be_read_where_its_method_is_not(mine: Any, tmp_path: Path) -> None:
    """To go on with it, the module is needed."""
    folder, output = mine(GOOD), tmp_path / "runs"
    assert command(folder, output).returncode == 0
    (run,) = output.iterdir()
    own = folder / "mine.py"
    there, _ = grouped([fedcil.load(run)]), own.rename(tmp_path / "elsewhere.py")
    sys.modules.pop("mine")
    (away,) = grouped([fedcil.load(run)])
    assert (away.label, away.mean) == (there[0].label, there[0].mean)
    assert fedcil.load(run).scenario.method.name == "mine:Mine"
    assert write_report(fedcil.load(run)).is_file()
    (run / "summary.json").unlink()
    with pytest.raises(ScenarioError, match="module 'mine' cannot be imported"):
        fedcil.resume(run, figures=False)
    stored = (run / "scenario.toml").read_text()
    for damaged, says in ((stored + "\n[training", "not a TOML file"), ("rounds = 1\n" + stored, "unknown key rounds")):
        (run / "scenario.toml").write_text(damaged)
        with pytest.raises(ScenarioError, match=says):
            _ = fedcil.load(run).scenario


CAPRICE = """
import numpy as np

def share(labels, clients, section, rng):
    places = np.random.default_rng().permutation(len(labels))  # not the one that it was given
    return np.array_split(places, clients)
"""


def test_a_partition_that_does_not_follow_from_the_seed_is_found_out(
    mine: Any, tmp_path: Path, stopped_run: Callable[..., Path]
) -> None:
    folder = mine(GOOD)
    (folder / "mine.py").write_text((folder / "mine.py").read_text() + CAPRICE)
    run = stopped_run(SCENARIO | {"partition": {"name": "mine:share"}}, 1, tmp_path / "runs")
    with pytest.raises(NotResumable, match=r"partition was [0-9a-f]+, now "):
        fedcil.resume(run, figures=False)


def test_a_figure_of_a_boundary_may_have_any_name(mine: Any, tmp_path: Path) -> None:
    """MFCL's has a drawing in the report."""
    mine("Method(boundary=lambda state, *_: Boundary(state, log={'histogram': ['a', 2]}))")
    assert write_report(fedcil.run(SCENARIO, output=tmp_path / "runs", figures=False)).is_file()


def test_a_run_that_never_trained_is_no_success(mine: Any, tmp_path: Path) -> None:
    folder = mine("Method(loss=lambda model, prepared, batch, draws: model(batch.images).sum() * float('nan'))")
    done = command(folder, tmp_path / "runs")
    assert done.returncode == 1, done.stderr
    assert "no round changed the model" in done.stderr
    done = command(folder, tmp_path / "runs", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["what"].startswith("no round changed the model")  # one object, not two


def test_a_name_that_is_not_there_is_not_proposed_again(mine: Any, tmp_path: Path) -> None:
    mine(GOOD)
    with pytest.raises(ScenarioError) as caught:
        fedcil.run(SCENARIO | {"method": {"name": "mine:Mime"}}, output=tmp_path / "runs")
    assert "did you mean" not in caught.value.what


def test_workers_of_one_version_but_other_files_differ(tmp_path: Path) -> None:
    """Two commits of fedcil may have the same version."""
    for name in ("fedcil", "client", "server"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("x = 1\n")
    before = program(tmp_path)
    program.cache_clear()
    assert program(tmp_path) == before
    (tmp_path / "client" / "a.py").write_text("x = 2\n")
    program.cache_clear()
    changed = program(tmp_path)
    assert changed != before


OURS = {
    "ours/__init__.py": "",
    "ours/method.py": """
import torch, fedcil.section
from .parts import losses
try:
    import broken
except SyntaxError:
    pass
import torch.nn, json
import joblib

def plot():
    import plots

if __name__ == "__main__":
    import driver

class Mine: pass
""",
    "ours/parts/__init__.py": "",
    "ours/parts/losses.py": "from lone import RATE\n",
    "lone.py": """
try:
    from . import helper
except ImportError:
    import helper
RATE = 1
""",
    "helper.py": "",
    "broken.py": "print 'of Python 2'",
    "plots.py": "import a_package_that_is_not_there",
    "driver.py": "raise SystemExit('driven')",
    "joblib.py": "raise SystemExit('not the one that is installed')",
}


def test_what_own_modules_import_from_beside_them_is_their_code_too(tmp_path: Path) -> None:
    """Not what is installed, even if a file beside them has its name; nothing is imported for it."""
    for name, text in OURS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    code = (
        "import json, sys; sys.path.append(''); from fedcil.sources import changed_since_loaded, sources_of\n"
        "targets = ['ours.method:Mine', 'digits']; before = sources_of(targets)\n"
        "open('helper.py', 'a').write('x = 1\\n'); assert sources_of(targets) == before\n"
        "assert changed_since_loaded(targets) == ['helper']; assert 'plots' not in sys.modules\n"
        "print(json.dumps(before))"
    )

    def found() -> dict[str, str]:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        digests: dict[str, str] = json.loads(done.stdout)
        return digests

    before = found()
    assert list(before) == ["helper", "lone", "ours", "ours.method", "ours.parts", "ours.parts.losses"]
    assert [name for name, digest in found().items() if digest != before[name]] == ["helper"]


def test_a_process_that_has_imported_own_code_records_that_and_says_so(mine: Any, tmp_path: Path) -> None:
    folder = mine(GOOD)
    first = fedcil.run(SCENARIO, output=tmp_path / "runs", figures=False)
    (folder / "mine.py").write_text(SOURCE.format(GOOD) + "\n# other\n")
    with pytest.warns(UserWarning, match="mine has changed since it was imported"):
        second = fedcil.run(SCENARIO, output=tmp_path / "runs", figures=False)
    assert second.own_code == first.own_code
    importlib.reload(sys.modules["mine"])
    assert fedcil.run(SCENARIO, output=tmp_path / "runs", figures=False).own_code != first.own_code


@pytest.mark.parametrize(
    ("key", "allowed"), [("method.name", "mine:Mine"), ("data.name", "mine:data"), ("model.name", "mine:net")]
)
@pytest.mark.parametrize(("line", "says"), [("1 / 0", "ZeroDivisionError"), ("exit(3)", "SystemExit: 3")])
def test_a_module_that_raises_as_it_is_imported_is_said(
    key: str, allowed: str, line: str, says: str, mine: Any, tmp_path: Path
) -> None:
    folder = mine(GOOD)
    (folder / "mine.py").write_text(line)
    with pytest.raises(ScenarioError, match=f"module 'mine' raised {says}") as caught:
        fedcil.run(SCENARIO | {"method": {"name": "fedavg"}}, overrides=[f"{key}='{allowed}'"], output=tmp_path)
    assert key in caught.value.where


@pytest.mark.parametrize(("line", "says"), [("1 / 0", "ZeroDivisionError"), ("raise SystemExit(3)", "SystemExit: 3")])
def test_a_data_function_that_raises_is_said_with_its_line(line: str, says: str, mine: Any, tmp_path: Path) -> None:
    folder = mine(GOOD)
    (folder / "mine.py").write_text(f"def data(section, root):\n    {line}\n")
    with pytest.raises(ScenarioError, match=rf"mine:data raised {says}.*\(mine.py:2\)") as caught:
        fedcil.run(SCENARIO | {"method": {"name": "fedavg"}, "data": {"name": "mine:data"}}, output=tmp_path)
    assert "data.name" in caught.value.where
