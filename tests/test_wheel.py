"""The wheel, installed elsewhere: a scenario runs from it, and nothing of the checkout is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


def test_a_deployment_installs_what_fedcil_needs() -> None:
    """Its list is that of the package, but for what it says itself: no Ray, no torchvision, and what builds it."""
    wanted = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    listed = {line for line in (ROOT / "deploy" / "requirements.txt").read_text().splitlines() if line[0] != "#"}
    of_ray = {each for each in wanted if each.startswith(("flwr", "torchvision"))}
    assert listed - (wanted - of_ray) == {"flwr==1.41.0", "hatchling>=1.25"}
    assert wanted - listed == of_ray


def test_a_scenario_runs_from_the_wheel(tmp_path: Path) -> None:
    """Built without isolation and installed beside the libraries that are here, since CI has no time for 6 GB."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    home = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(home), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    code = (
        "import sys, json; sys.path.insert(0, {home!r}); import fedcil; "
        "assert fedcil.__file__.startswith({home!r}), fedcil.__file__; "
        "run = fedcil.run('digits_fedavg', overrides=['training.rounds=1'], output={out!r}); "
        "print(json.dumps([run.finished, len(list((run.path / 'figures').iterdir()))]))"
    ).format(home=str(home), out=str(tmp_path / "runs"))
    environment = os.environ | {"PYTHONPATH": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
    )
    finished, pictures = json.loads(done.stdout)
    assert finished
    assert pictures >= 3


def test_scripts_are_installed() -> None:
    assert (Path(sysconfig.get_path("scripts")) / "fedcil").exists()
