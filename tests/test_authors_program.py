"""Running the released MFCL program beside fedcil, with a small stand-in: the program itself is not part of fedcil."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scenarios.authors.compare import Result, ours, print_table, theirs

pytestmark = pytest.mark.slow

# What the program asks of its surroundings, in few lines: a GPU, CIFAR-100, a ResNet-18, a progress bar, its options.
MAIN = """
import argparse
from tqdm import tqdm
import torch
from torchvision import datasets, transforms
from models.ResNet import ResNet18

options = argparse.ArgumentParser()
for name in "path seed num_clients frac n_tasks global_round eval_int epochs syn_size server_ss pi z_dim".split():
    options.add_argument("--" + name, required=True)
for name in "generator_lr w_kd w_ie w_bn".split():
    options.add_argument("--" + name, type=float, required=True)
args = options.parse_args()
images = datasets.CIFAR100(root=args.path, train=False, download=True, transform=transforms.ToTensor())
assert len(images) == 1200 and sorted(set(images.targets)) == list(range(12))
network = ResNet18(100, cifar=True).to("cuda")
image, label = images[7]
features = network(torch.stack([image, image]).to("cuda")) * torch.ones(1, dtype=torch.float32, device="cuda")
assert features.shape == (2, network.fc.in_features) and label == images.targets[7]
for task in tqdm(range(int(args.n_tasks))):
    print(f"round {task * 20 + 19}, accuracy: {80 - 10.5 * task}")
    print(f"total_accuracy_{task}: [tensor(12.)]")
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    folder = tmp_path / "program"
    for place, text in {
        "main.py": MAIN,
        "clients/MFCL.py": "",
        "models/__init__.py": "",
        "models/ResNet.py": "def ResNet18(classes, cifar):\n    raise AssertionError('not replaced')\n",
    }.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text)
    return folder


@pytest.mark.data
def test_the_program_runs_and_its_accuracies_are_read(
    program: Path, real_data: Callable[..., Path], tmp_path: Path
) -> None:
    result = theirs(program, 0, real_data("cifar-100-python"), tmp_path)
    assert result.accuracies == (80.0, 69.5, 59.0)
    assert result.cpu_s > 0


def test_a_program_that_fails_ends_the_comparison(program: Path, tmp_path: Path) -> None:
    (program / "main.py").write_text("raise ValueError('no GPU')")
    with pytest.raises(SystemExit, match=r"exit code 1 of .*see .*theirs-0\.log"):
        theirs(program, 0, tmp_path, tmp_path)
    assert "no GPU" in (tmp_path / "theirs-0.log").read_text()


@pytest.mark.parametrize("module", ["steps", "cost", "compare"])
def test_a_folder_without_the_program_is_said(module: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"scenarios.authors.{module}", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path} has no clients/MFCL.py")
    assert "git clone" in done.stderr


@pytest.mark.data
def test_fedcil_runs_what_the_program_runs(
    real_data: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In small: one round of one epoch, and few generated images."""
    for name, value in {"ROUNDS": 1, "EPOCHS": 1, "SYNTHETIC": 2, "STEPS": 1, "GENERATOR_BATCH": 2}.items():
        monkeypatch.setattr(f"scenarios.authors.compare.{name}", value)
    result = ours(0, real_data("cifar-100-python"), tmp_path)
    assert len(result.accuracies) == 3
    assert all(0 <= accuracy <= 100 for accuracy in result.accuracies)


def test_the_table_has_means_and_deviations(capsys: pytest.CaptureFixture[str]) -> None:
    print_table({"one": [Result((80.0, 40.0), 10.0), Result((70.0, 20.0), 30.0)]})
    assert capsys.readouterr().out.splitlines()[-1] == "| one | 75.0, 30.0 | 52.5 ± 10.6 | 30.0 ± 14.1 | 20 |"
