"""Memory: who has too little is told, and it does not grow with rounds (scenarios/reliability/memory.py, in small)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fedcil
from fedcil.cli.forecast import forecast
from fedcil.engines import memory
from fedcil.experiment import open_experiment
from fedcil.scenario_file import load_scenario
from scenarios.reliability.memory import Sample, judge

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny.toml"


def samples(growth: float) -> list[Sample]:
    return [Sample(r, 100.0 + growth * r, 50.0, 1, 10) for r in range(1, 201, 5)]


def test_what_grows_is_found() -> None:
    """100 MB and 0.01 MB a round stay within 5 % of round 20; 0.1 MB a round does not."""
    assert judge(samples(0.01), 200)["passed"]
    grown = judge(samples(0.1), 200)
    assert not grown["passed"]
    assert grown["resident"]["round_20"] == pytest.approx(102.35, abs=0.1)
    assert grown["resident"]["end"] == pytest.approx(118.9, abs=0.5)


def test_a_run_says_that_there_may_be_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "machine_bytes", lambda: 100 << 20)
    with pytest.warns(UserWarning, match="MB of memory, more than the 100 MB that there are"):
        run = fedcil.run(TINY, output=tmp_path, figures=False)
    assert "more than the 100 MB" in forecast(open_experiment(run.scenario))["notes"][-1]
    elsewhere = load_scenario(TINY, ["engine={name='ray', address='auto', workers=64}"])
    assert not forecast(open_experiment(elsewhere))["notes"]


@pytest.mark.parametrize(("file", "says"), [("memory.max", "1000\n"), ("memory/memory.limit_in_bytes", "1000\n")])
def test_a_container_may_have_less_than_the_machine(
    file: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    whole = memory.machine_bytes()
    assert whole > 1 << 30
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("max\n")
    assert memory.machine_bytes() == whole
    (tmp_path / file).write_text(says)
    assert memory.machine_bytes() == 1000


def test_large_tensors_are_no_memory_that_is_kept() -> None:
    """Of ResNet-18 at 160 images those of the first stage are: three times as much was said to be needed."""
    layers = [4 << 18, 4 << 10]
    assert memory.activation_bytes(layers, 8) == 2 * 3 * 8 * sum(layers)
    assert memory.activation_bytes(layers, 160) == 2 * 160 * ((4 << 18) + 3 * (4 << 10))


def test_the_boundary_is_one_whatever_the_workers() -> None:
    """With workers the clients' part grows, and a boundary that needs more than these does not."""
    sets = ["method={name='mfcl', preset='small', generator_batch=4000}", "training.batch_size=2"]
    one, two = (
        memory.predicted_memory(open_experiment(load_scenario("digits_mfcl", [*sets, f"engine.workers={workers}"])))
        for workers in (1, 2)
    )
    assert one == two


def test_a_plan_says_what_late_updates_take() -> None:
    clock = "name='lognormal', samples_per_s=9, down_bytes_per_s=9, up_bytes_per_s=9, deadline_s=1, late='fold'"
    late = [f"clock={{{clock}}}"]
    assert any("an update on its way" in note for note in forecast(open_experiment(load_scenario(TINY, late)))["notes"])


@pytest.mark.slow
def test_100_rounds_inline_need_what_20_need(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scenarios.reliability.memory", "--rounds", "100", "--clients", "20"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "memory")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "memory-inline.json").read_text())
    files = result["files"]
    assert files["end"] < files["round_20"] + 2  # one of the run's own may be open as it is looked at
    assert len((tmp_path / "memory-inline.csv").read_text().splitlines()) > 15
