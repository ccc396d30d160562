"""What a run on a GPU owes its user. Each test is tried on a CPU as well, where nobody has a card."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fedcil
from fedcil.errors import RunFailed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

TINY = str(Path(__file__).with_name("tiny.toml"))
MFCL = "method={name='mfcl', preset='small', steps=5, pool=64}"
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])

# Client 3 has 22 of the samples of a task. An assertion on the device, which a CPU plays: nothing works after it.
MODULE = """
import torch
from torch.nn import functional as F
from fedcil.methods.base import Method
from fedcil.methods.settings import MethodSettings

broken = False


class Breaking(MethodSettings):
    def build(self):
        return Method(loss=loss)


def loss(model, prepared, batch, draws):
    global broken
    if len(batch.labels) == 22 and batch.images.is_cuda:
        torch._assert_async(torch.zeros(1, device=batch.images.device))
        torch.cuda.synchronize()
    if len(batch.labels) == 22 or broken:
        broken = True
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")
    return F.cross_entropy(model(batch.images), batch.labels)


def share(labels, clients, section, rng):
    import numpy as np

    return np.split(np.arange(len(labels)), [6, 12, 18])
"""


def run(device: str, folder: Path, *overrides: str) -> fedcil.Run:
    return fedcil.run(TINY, overrides=[f"device='{device}'", *overrides], output=folder, figures=False)


def run_by_command(device: str, folder: Path, *overrides: str) -> fedcil.Run:
    sets = [f"--set={text}" for text in (f"device='{device}'", *overrides)]
    command = [sys.executable, "-m", "fedcil", "run", TINY, *sets, "--no-figures", "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    return fedcil.load(folder / json.loads(done.stdout)["run_dir"])


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of a person's own."""
    name = f"odd_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@DEVICES
def test_a_run_gives_the_same_twice(device: str, tmp_path: Path) -> None:
    assert run(device, tmp_path).results == run(device, tmp_path).results


@DEVICES
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_clients_side_by_side_learn_what_one_by_one_they_do(precision: str, device: str, tmp_path: Path) -> None:
    words = (MFCL, f"training.precision='{precision}'", "server.evaluate_every=1")
    lanes, alone = (run(device, tmp_path, *words, f"engine.lanes={count}").kind("round") for count in (2, 0))
    near = {"fp32": 1e-3, "bf16": 5e-2}[precision]
    assert [line["loss"] for line in lanes] == pytest.approx([line["loss"] for line in alone], rel=near)


@DEVICES
def test_a_run_that_was_stopped_goes_on_as_if_nothing_had_been(device: str, stopped_run: Any, tmp_path: Path) -> None:
    folder = stopped_run(TINY, 3, tmp_path / "stopped", [f"device='{device}'"])
    assert fedcil.resume(folder, figures=False).results == run(device, tmp_path).results


@DEVICES
@pytest.mark.parametrize("engine", ["ray", "flower"])
def test_workers_that_share_it_give_what_inline_does(engine: str, device: str, tmp_path: Path) -> None:
    """Flower's clients come one by one, so for them there is one lane."""
    lanes, shares = (["engine.lanes=1"], ["engine.gpus_per_worker=0.5"]) if device == "cuda" else ([], [])
    found = run_by_command(device, tmp_path, f"engine.name='{engine}'", "engine.workers=2", *lanes, *shares)
    assert found.results == run(device, tmp_path / "inline", *lanes).results


@DEVICES
def test_dropout_draws_from_the_runs_seed(device: str, tmp_path: Path) -> None:
    first, second = (run(device, tmp_path, "model.name='dropping:build'") for _ in range(2))
    assert first.results == second.results


@DEVICES
@pytest.mark.parametrize("lanes", [0, 2])
def test_a_client_that_breaks_the_gpu_ends_an_inline_run_with_the_reason(
    lanes: int, device: str, odd: str, tmp_path: Path
) -> None:
    words = (f"method={{name='{odd}:Breaking'}}", f"partition={{name='{odd}:share'}}", f"engine.lanes={lanes}")
    with pytest.raises(RunFailed, match="a client's work broke the GPU for this process") as problem:
        run(device, tmp_path, *words, "clients.per_round=4")
    assert "CUDA_LAUNCH_BLOCKING=1" in str(problem.value.next)


@DEVICES
def test_on_ray_only_the_client_that_breaks_the_gpu_is_lost(device: str, odd: str, tmp_path: Path) -> None:
    words = [f"method={{name='{odd}:Breaking'}}", f"partition={{name='{odd}:share'}}", "clients.per_round=4"]
    shares = ["engine.gpus_per_worker=0.5"] if device == "cuda" else []
    lines = run_by_command(device, tmp_path, *words, "engine={name='ray', workers=2}", *shares).kind("round")
    assert [line["answered"] for line in lines] == [[0, 1, 2]] * 4
    reasons = {failure["reason"] for line in lines for failure in line["failures"]}
    assert reasons == {"its worker died 3 times", "its worker died again"}
