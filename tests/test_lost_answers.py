"""An answer that was made, and was lost with its node before it was read: somebody else makes it again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedcil import api
from fedcil.record.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280), pytest.mark.engines]

LARGE_ANSWERS = ["model.width=64", "data.classes=4", "stream.tasks=1", "training.rounds=2", "training.epochs=1"]

# Ray keeps answers above 100 kB on the node where they were made until the driver asks for them.
SCRIPT = """
import os, sys, time
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
from ray.cluster_utils import Cluster
from fedcil import api

node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=node)
far = cluster.add_node(**node)
put, wait, asked = ray.put, ray.wait, False

def ask(value):
    global asked
    asked = True
    return put(value)

def lose_answers(references, **options):
    global far
    if far and asked:
        answered, _ = wait(references, num_returns=len(references), timeout=60, fetch_local=False)
        print("answers:", len(answered))
        cluster.remove_node(far)
        far = None
        time.sleep(1)
    return wait(references, **options)

ray.put, ray.wait = ask, lose_answers
engine = ["engine.name='ray'", "engine.workers=2", f"engine.address='{cluster.address}'"]
try:
    api.run("digits_fedavg", overrides=[*sys.argv[2:], *engine], output=sys.argv[1], figures=False)
finally:
    ray.shutdown()
    cluster.shutdown()
"""


def test_an_answer_that_is_lost_with_its_node_is_made_again(tmp_path: Path) -> None:
    expected = api.run("digits_fedavg", overrides=LARGE_ANSWERS, output=tmp_path / "inline", figures=False)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "ray"), *LARGE_ANSWERS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "answers: 2" in done.stdout
    (folder,) = (tmp_path / "ray").iterdir()
    assert without_cost(api.load(folder)) == without_cost(expected)


def without_cost(run: Run) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "cost"} for line in run.lines]
