"""The ladder of GPU forms, as far as a CPU can try it: each form's weights, and the command at tiny size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedcil import cpu
from scenarios.benchmarks.ladder import EQUAL, differ, flops, matrix_rate
from scenarios.benchmarks.material import PAPER, TINY, Material
from scenarios.benchmarks.rungs import RUNGS

ROOT = Path(__file__).parent.parent
ON_CPU = ("merged", "resident", "stacked2", "stacked5", "lane", "lanes2", "ahead")
CPU = torch.device("cpu")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ON_CPU)
def test_a_rung_gives_the_weights_of_the_authors_order(name: str) -> None:
    found, expected = (RUNGS[each].open(Material(TINY, "fp32", CPU))() for each in (name, "authors"))
    assert differ(found, expected, Material(TINY, "fp32", CPU).start) <= EQUAL


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["lane", "lanes2"])
def test_a_second_round_over_fixed_inputs_is_the_first_again(name: str) -> None:
    """What a client leaves behind in the fixed memory must not reach the next."""
    round_ = RUNGS[name].open(Material(TINY, "fp32", CPU))
    first = round_()
    assert all(torch.equal(tensor, first[each]) for each, tensor in round_().items())


def test_differences_are_of_a_tensors_own_change() -> None:
    start = {"a": torch.zeros(2), "still": torch.zeros(1)}
    expected = {"a": torch.tensor([0.1, 0.0]), "still": torch.zeros(1)}
    found = {"a": torch.tensor([0.1, 0.01]), "still": torch.ones(1)}
    assert differ(found, expected, start) == pytest.approx(0.1)


def test_flops_are_those_of_the_specification() -> None:
    """5 x (100 x 4 + 4 x 128 x 4) images of 1.111 GFLOP and the generator's 0.246 for 20 x 128 latents."""
    counted = flops(PAPER, CPU)
    assert counted["step"] == pytest.approx(5 * (100 + 512) * 4 * 1.111e9 + 2560 * 0.246e9, rel=0.01)
    assert counted["pool"] < counted["step"]
    assert matrix_rate("fp32", CPU, tiny=True) > 1e-3


@pytest.mark.gpu
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["lane", "lanes2", "lanes3"])
def test_a_captured_rung_gives_the_weights_of_the_authors_order(name: str) -> None:
    device = torch.device("cuda")
    found, expected = (RUNGS[each].open(Material(TINY, "fp32", device))() for each in (name, "authors"))
    assert differ(found, expected, Material(TINY, "fp32", device).start) <= EQUAL


@pytest.mark.slow
def test_the_ladder_by_its_command(tmp_path: Path) -> None:
    """All rungs but torch.compile, which takes minutes; on a CPU tf32 fails and is reported."""
    rungs = [name for name in RUNGS if name != "compile"]
    command = [sys.executable, "-m", "scenarios.benchmarks.ladder", str(tmp_path), "--device", "cpu", "--tiny"]
    command += ["--repeats", "1", "--rungs", ",".join(rungs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=280)
    table = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0].removeprefix("| ") for row in table[1:]] == rungs
    content = json.loads((tmp_path / "ladder.json").read_text())
    for name, row in content["rungs"].items():
        if "tf32" in name:
            assert "NVIDIA" in row["failed"]
            continue
        assert "failed" not in row, (name, row)
        assert row["steps_per_s"] > 0
        assert row["of_matrix_rate"] > 0
        assert row["of_matrix_rate"] < 1 or not cpu.bf16_instructions()  # emulated products are slow
        assert len(content["seconds"][name]) == 2
        assert row["equal"] is True if RUNGS[name].exact else "equal" not in row


def test_a_ladder_that_is_out_of_time_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scenarios.benchmarks.ladder", str(tmp_path), "--device", "cpu", "--tiny"]
    done = subprocess.run([*command, "--max-seconds", "0"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.count("--max-seconds were up") == len(RUNGS)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--rungs", "authors,bogus"], "no rung bogus; allowed: authors, "),
        (["--device", "cuda"], "torch sees no GPU"),
    ],
)
def test_what_cannot_be_measured_is_said_first(words: list[str], problem: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scenarios.benchmarks.ladder", str(tmp_path / "out"), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert problem in done.stderr
    assert "Traceback" not in done.stderr
