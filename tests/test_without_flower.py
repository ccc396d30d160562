"""The inline engine needs neither flwr nor ray, and says so where they are asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("flwr", "ray"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from fedcil.cli import main
"""


def fedcil(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = f"{BLOCK}\nsys.argv = {['fedcil', *arguments]!r}\nmain()"
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


def test_the_inline_engine_runs(tmp_path: Path) -> None:
    done = fedcil("run", "digits_fedavg", "--set", "training.rounds=1", "--no-figures", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_other_engines_say_what_is_missing(tmp_path: Path) -> None:
    for engine in ("ray", "flower"):
        done = fedcil("run", "digits_fedavg", "--engine", engine, "--no-figures", cwd=tmp_path)
        assert done.returncode == 2
        assert "needs a package that is not here" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "runs").exists()
