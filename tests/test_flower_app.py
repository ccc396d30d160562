"""``flwr run .`` on a checkout: the same program as a Flower app, the same bits."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import fedcil

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ["data.classes=4", "stream.tasks=2", "training.rounds=1", "training.epochs=1", "method.steps=3"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(290)]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def copy_app(target: Path) -> None:
    """What the bundle is made of, without what else lies in a checkout."""
    for package in ("fedcil", "server", "client", "scenarios"):
        shutil.copytree(ROOT / package, target / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", target)
    shutil.copy(ROOT / "README.md", target)
    shutil.copy(ROOT / "LICENSE", target)


def end_daemons(ports: list[int]) -> None:
    """Flower leaves its local SuperLink running; it and its children are known by their ports."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(str(port) in word for port in ports for word in words) and "flower-" in " ".join(words):
            process.terminate()
    time.sleep(2)


def test_flwr_run_gives_the_metrics_of_the_inline_engine(tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    scripts = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(ports[0]),
        "FLWR_LOCAL_CONTROL_API_PORT": str(ports[1]),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": "local",  # not another test's cluster
        "FEDCIL_CLIENT_HOME": str(tmp_path / "clients"),
    }
    copy_app(tmp_path / "app")
    config = f'set="{";".join(SETTINGS)}" output="{tmp_path / "flower"}"'
    try:
        command = [str(scripts / "flwr"), "run", ".", "--stream", "-c", config]
        done = subprocess.run(
            command, cwd=tmp_path / "app", env=environment, capture_output=True, text=True, timeout=240, check=False
        )
    finally:
        end_daemons(ports)
    folders = list((tmp_path / "flower").glob("*/summary.json"))
    assert folders, done.stdout + done.stderr
    inline = [sys.executable, "-m", "fedcil", "run", "digits_mfcl", "--no-figures", "--output", str(tmp_path / "in")]
    inline += [part for text in SETTINGS for part in ("--set", text)]
    subprocess.run(inline, cwd=tmp_path, check=True, timeout=120)
    (reference,) = (tmp_path / "in").iterdir()
    assert fedcil.load(folders[0].parent).results == fedcil.load(reference).results
