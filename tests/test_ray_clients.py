"""On Ray, a client that is late or takes its worker along is the only one that a round loses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

# Of 33 samples client 0 has 5, in one batch, and the others 4.
MODULE = """
import os, time
import torch
from fedcil.methods.base import Method, Phase
from fedcil.methods.settings import MethodSettings
from fedcil.tensors import Contribution


class Odd(MethodSettings):
    seconds: float = 0.0

    def build(self):
        def loss(model, prepared, batch, draws):
            if len(batch.labels) == 5 and not self.seconds:
                open("killed", "a").write("x")
                os._exit(1)  # as a crash in a kernel would, or the system where memory is short
            if len(batch.labels) == 5:
                time.sleep(self.seconds)
            return torch.nn.functional.cross_entropy(model(batch.images), batch.labels)

        return Method(loss=loss)


class Nothing(MethodSettings):
    def build(self):
        def fit(network, own, task, images):
            return Contribution({} if len(own.labels) == 5 else {"a": torch.ones(2)}, 1.0)

        return Method(
            phases=lambda task, rounds: (Phase(name="statistics", rounds=rounds, work="fit"),),
            fit=fit,
            reduce=lambda state, phase, total: state,
        )


def share(labels, clients, section, rng):
    import numpy as np

    sizes = [5] + [4] * (clients - 2)
    cuts = np.cumsum(sizes)
    return np.split(np.arange(len(labels)), cuts)
"""
SETS = [
    "data={name='synthetic', classes=3, samples_per_class=11}",
    "stream={tasks=1}",
    "partition={name='odd:share'}",
    "clients={count=8, per_round=8}",
    "model={name='cnn', width=4}",
    "training={rounds=2, epochs=2, batch_size=8}",
    "engine={name='ray', workers=2}",
]


def rounds(tmp_path: Path, *sets: str) -> list[dict[str, Any]]:
    (tmp_path / "odd.py").write_text(MODULE)
    words = [word for text in (*SETS, *sets) for word in ("--set", text)]
    command = [sys.executable, "-m", "fedcil", "run", "digits_fedavg", *words, "--no-figures", "--output", "runs"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "runs").glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["kind"] == "round"]


def test_who_is_late_takes_no_other_along(tmp_path: Path) -> None:
    lines = rounds(tmp_path, "method={name='odd:Odd', seconds=60}", "server.deadline_s=15")
    assert [line["answered"] for line in lines] == [list(range(1, 8))] * 2
    assert [[each["stage"] for each in line["failures"]] for line in lines] == [["deadline"]] * 2


def test_a_round_waits_for_the_only_worker_that_a_late_client_left(tmp_path: Path) -> None:
    """The client is asked last in the next one, whose time begins when the worker has been restarted: some seconds."""
    sets = ("method={name='odd:Odd', seconds=60}", "server.deadline_s=10", "engine={name='ray', workers=1}")
    lines = rounds(tmp_path, *sets)
    assert [line["answered"] for line in lines] == [[], list(range(1, 8))]


def test_who_kills_its_worker_takes_no_other_along(tmp_path: Path) -> None:
    lines = rounds(tmp_path, "method={name='odd:Odd'}")
    assert [line["answered"] for line in lines] == [list(range(1, 8))] * 2
    reasons = [each["reason"] for line in lines for each in line["failures"]]
    assert reasons == ["its worker died 3 times", "its worker died again"]
    assert (tmp_path / "killed").read_text() == "x" * 4


def test_contributions_that_do_not_fit_together_end_the_run_as_they_do_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(MODULE)
    words = [word for text in (*SETS, "method={name='odd:Nothing'}") for word in ("--set", text)]
    for engine in ("inline", "ray"):
        command = [
            sys.executable,
            "-m",
            "fedcil",
            "run",
            "digits_fedavg",
            *words,
            "--engine",
            engine,
            "--output",
            engine,
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False)
        assert done.returncode == 1
        assert "contributions that cannot be summed: a client gives no tensors" in done.stderr


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1", "127.0.0.1:notaport"])
def test_an_address_that_is_none_is_said(address: str, tmp_path: Path) -> None:
    sets = ["--set", "engine.name=ray", "--set", f"engine.address={address}"]
    command = [sys.executable, "-m", "fedcil", "run", "digits_fedavg", *sets, "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no Ray cluster that can be used")
    assert "Traceback" not in done.stderr
