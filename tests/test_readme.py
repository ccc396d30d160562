"""The README's own example, run as a newcomer would: saved to a file, named on the command line."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import fedcil

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_method_of_the_readme_runs_from_its_own_command(tmp_path: Path) -> None:
    (code,) = [block for block in blocks("python") if "MethodSettings" in block]
    (command,) = [line for line in README.splitlines() if line.startswith("fedcil run") and "smooth:Smooth" in line]
    (tmp_path / "smooth.py").write_text(code)
    words = [sys.executable, "-m", *shlex.split(command), "--set=training.rounds=1", "--no-figures", "--json"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["method"] == "smooth:Smooth"


def test_the_scenario_of_the_readme_is_the_shipped_one() -> None:
    (text,) = blocks("toml")
    assert fedcil.load_scenario(tomllib.loads(text)).deciding() == fedcil.load_scenario("digits_mfcl").deciding()


def test_files_that_the_readme_points_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    for command in ("run", "resume", "compare", "report", "plan", "list", "schema"):
        assert f"fedcil {command}" in README


def test_the_method_of_the_docs_forgets_less(tmp_path: Path) -> None:
    docs = (ROOT / "docs" / "extending.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", docs, flags=re.DOTALL) if "boundary" in block]
    (command,) = [line for line in docs.splitlines() if line.startswith("fedcil run") and "teacher:" in line]
    (tmp_path / "teacher.py").write_text(code)
    forgotten = []
    for words in (shlex.split(command), ["fedcil", "run", "digits_fedavg"]):
        more = ["--set=stream.tasks=2", "--set=data.classes=4", "--set=training.rounds=3", "--no-figures", "--json"]
        done = subprocess.run(
            [sys.executable, "-m", *words, *more],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        forgotten.append(json.loads(done.stdout)["forgetting"])
    assert forgotten[0] < forgotten[1]


def test_the_method_of_the_docs_that_trains_nothing_knows_all_classes(tmp_path: Path) -> None:
    docs = (ROOT / "docs" / "extending.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", docs, flags=re.DOTALL) if "means.py" in block]
    (command,) = [line for line in docs.splitlines() if line.startswith("fedcil run") and "means:" in line]
    (tmp_path / "means.py").write_text(code)
    words = [sys.executable, "-m", *shlex.split(command), "--no-figures", "--json"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert all(run["average_incremental_accuracy"] > 0.8 for run in json.loads(done.stdout))


def test_own_data_and_model_of_the_docs_run(tmp_path: Path) -> None:
    codes = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), flags=re.DOTALL)
    (tmp_path / "mine.py").write_text("\n\n".join(codes[:2]))
    sets = ["data.name=mine:load", "model.name=mine:build", "stream.tasks=2", "training.rounds=1"]
    sets += ["clients.count=4", "clients.per_round=2"]
    words = [sys.executable, "-m", "fedcil", "run", "digits_fedavg", "--no-figures"]
    words += [part for text in sets for part in ("--set", text)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
