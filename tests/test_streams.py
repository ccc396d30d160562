"""Streams that cannot take what is written to them: full disks, closed pipes, poor terminals."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fedcil

FEDCIL = [sys.executable, "-m", "fedcil"]
RUN = ["run", str(Path(__file__).with_name("tiny.toml")), "--no-figures"]


@pytest.fixture(params=["buffered", "unbuffered"], autouse=True)
def buffering(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "buffered":
        monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    else:
        monkeypatch.setenv("PYTHONUNBUFFERED", "1")


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """``fedcil`` stands for the command line."""
    words = ["bash", "-o", "pipefail", "-c", f'fedcil() {{ {" ".join(FEDCIL)} "$@"; }}; {command}']
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("log", ["2>/dev/full", "2>&-", "2> >(true)"])
def test_a_log_that_cannot_be_written_ends_no_run(log: str, tmp_path: Path) -> None:
    done = shell(f"fedcil {shlex.join(RUN)} {log}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fedavg" in done.stdout
    assert list(tmp_path.glob("runs/*/summary.json"))


@pytest.mark.parametrize(
    "words", ["list", "list --json", "run --help", "--version", "plan nosuch --json", "nosuch --json"]
)
def test_output_that_is_not_all_there_is_an_error(words: str, tmp_path: Path) -> None:
    done = shell(f"fedcil {words} >/dev/full", tmp_path)
    assert done.returncode == 1
    assert "error: cannot write the output of this command: No space left on device\n  where: stdout\n" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", ["list", "schema", "run --help", "--version"])
def test_a_reader_that_has_gone_ends_a_command_as_the_signal_would(words: str, tmp_path: Path) -> None:
    done = shell(f"fedcil {words} | true", tmp_path)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_reader_that_was_never_there_ends_nothing(tmp_path: Path) -> None:
    assert shell("fedcil list >&-", tmp_path).returncode == 0


def test_a_terminal_without_a_character_shows_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of two seeds has a plus-minus."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = subprocess.run([*FEDCIL, *RUN, "--seeds=0,1"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert " ? " in done.stdout


TALKATIVE = """
import os
from contextlib import suppress
from fedcil.methods.base import Method
from fedcil.methods.settings import MethodSettings
from torch.nn import functional as F
print("at import")

class Talkative(MethodSettings):
    def build(self):
        print("in build")
        return Method(loss=loss)

def loss(model, prepared, batch, draws):
    print("in a step")
    with suppress(OSError):  # a disk that is full
        os.write(1, b"past Python\\n")
    return F.cross_entropy(model(batch.images), batch.labels)
"""


@pytest.mark.parametrize(
    ("command", "said"), [("run", ["at import", "in build", "in a step", "past Python"]), ("plan", ["in build"])]
)
def test_what_own_code_prints_is_no_result(command: str, said: list[str], tmp_path: Path) -> None:
    (tmp_path / "talkative.py").write_text(TALKATIVE)
    words = [command, *RUN[1:-1], "--set=method={name='talkative:Talkative'}", "--json"]
    done = subprocess.run([*FEDCIL, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)
    assert set(said) <= set(done.stderr.splitlines())
    if command == "run":
        again = ["compare", json.loads(done.stdout)["run_dir"], "--json"]
        done = subprocess.run([*FEDCIL, *again], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)
        assert "at import" in done.stderr


def test_what_a_client_cannot_print_costs_no_client(tmp_path: Path) -> None:
    (tmp_path / "talkative.py").write_text(TALKATIVE)
    words = shlex.join([*RUN, "--set=method={name='talkative:Talkative'}"])
    assert shell(f"fedcil {words} 2>/dev/full", tmp_path).returncode == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert not any(line["failures"] for line in fedcil.load(folder).kind("round"))


def test_a_stream_that_does_not_wait_is_waited_for() -> None:
    code = (
        "import os, sys; from fedcil.cli.streams import put_in_place; put_in_place(); os.set_blocking(1, False)\n"
        "print('x' * 1_000_000)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=-1, text=True) as writer:
        time.sleep(1)
        assert writer.stdout is not None
        assert len(writer.stdout.read()) == 1_000_001
    assert writer.returncode == 0


def test_output_is_in_order_and_whole(tmp_path: Path) -> None:
    """More than a pipe or a buffer holds."""
    code = (
        "import sys; from fedcil.cli.streams import put_in_place; put_in_place()\n"
        "for number in range(50_000): print(number); print(number, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = "".join(f"{number}\n" for number in range(50_000))
    assert (done.stdout, done.stderr) == (lines, lines)
