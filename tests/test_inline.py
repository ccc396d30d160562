"""The inline engine: deadlines, and clients that break."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fedcil
from fedcil.errors import RunFailed
from fedcil.methods.base import Batch, Draws, Method, Prepared
from fedcil.models.network import Network
from fedcil.section import MethodSettings


class Slow(MethodSettings):
    """Every step of the clients with an odd number of samples takes ``seconds``."""

    seconds: float = 0.0
    breaks: bool = False

    def build(self) -> Method:
        def loss(model: Network, prepared: Prepared, batch: Batch, draws: Draws) -> Tensor:
            if len(batch.labels) % 2:
                if self.breaks:
                    raise ValueError("this client is broken")
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
