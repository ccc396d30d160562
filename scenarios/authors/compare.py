"""The released MFCL program and fedcil on the same small task: the same accuracies? And what does each cost?

    git clone https://github.com/SaraBabakN/MFCL-NeurIPS23
    python -m scenarios.authors.compare MFCL-NeurIPS23 [--seeds 0,1,2,3] [--jobs 2] [--data-root DIR] [--output DIR]

The first 12 classes of CIFAR-100 in 3 tasks, 20 clients, 5 a round, 20 rounds a task, 2 local epochs, a narrow ResNet,
and the program's own losses with weights for a network so small. Each run is a process with one thread, ``--jobs`` of
them side by side. The two draw other numbers, so only means can agree. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import joblib

from fedcil import load
from fedcil.metrics import accuracy_after
from scenarios.authors.program import CLASSES, require_program

TASKS, CLIENTS, PER_ROUND, ROUNDS, EPOCHS = 3, 20, 5, 20, 2
SYNTHETIC, STEPS, LATENT, GENERATOR_BATCH, GENERATOR_LR = 32, 200, 64, 64, 0.002
W_KD, W_IE, W_BN = 1.0, 20.0, 10.0


@dataclass(frozen=True)
class Result:
    """One run: the accuracy on all classes seen after each task, in percent, and CPU seconds."""

    accuracies: tuple[float, ...]
    cpu_s: float

    @property
    def average(self) -> float:
        return statistics.mean(self.accuracies)


def theirs(folder: Path, seed: int, root: Path, output: Path) -> Result:
    """The program prints the accuracy of its last round of each task."""
    options = {
        "seed": seed,
        "num_clients": CLIENTS,
        "frac": PER_ROUND / CLIENTS,
        "n_tasks": TASKS,
        "global_round": ROUNDS,
        "eval_int": ROUNDS,
        "epochs": EPOCHS,
        "syn_size": SYNTHETIC,
        "server_ss": GENERATOR_BATCH,
        "pi": STEPS,
        "z_dim": LATENT,
        "generator_lr": GENERATOR_LR,
        "w_kd": W_KD,
        "w_ie": W_IE,
        "w_bn": W_BN,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "scenarios.authors.program", str(folder), str(root), *words]
    text, cpu = finished(command, output / f"theirs-{seed}.log")
    return Result(tuple(float(number) for number in re.findall(r"^round \d+, accuracy: ([\d.]+)$", text, re.M)), cpu)


def ours(seed: int, root: Path, output: Path) -> Result:
    method = (
        f"{{name='mfcl', preset='authors-code', synthetic={SYNTHETIC}, steps={STEPS}, latent={LATENT}, "
        f"generator_batch={GENERATOR_BATCH}, generator_lr={GENERATOR_LR}, w_kd={W_KD}, w_ie={W_IE}, w_bn={W_BN}}}"
    )
    sets = [
        f"name='ours-{seed}'",
        f"method={method}",
        f"data.classes={CLASSES}",
        f"stream.tasks={TASKS}",
        f"clients.count={CLIENTS}",
        f"clients.per_round={PER_ROUND}",
        f"training.rounds={ROUNDS}",
        f"training.epochs={EPOCHS}",
        "training.batches='ragged'",
        "server.weighting='uniform'",
        f"server.evaluate_every={ROUNDS}",
        "engine.workers=1",
    ]
    command = [sys.executable, "-m", "fedcil", "run", "cifar100_small_mfcl", "--seeds", str(seed), "--no-figures"]
    command += ["--data-root", str(root), "--output", str(output), *(word for text in sets for word in ("--set", text))]
    _, cpu = finished(command, output / f"ours-{seed}.log")
    run = load(max(output.glob(f"ours-{seed}-*/")))
    matrix, images = run.accuracy_matrix, run.test_counts
    return Result(tuple(100 * accuracy_after(matrix, images, task) for task in range(TASKS)), cpu)


def finished(command: Sequence[str], log: Path) -> tuple[str, float]:
    """What a command printed, and its CPU seconds."""
    with log.open("w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"error: exit code {process.returncode} of {' '.join(command[:4])} ..., see {log}")
    return log.read_text(), used.ru_utime + used.ru_stime


def print_table(found: dict[str, list[Result]]) -> None:
    """Mean and sample deviation."""
    print("\n| program | after each task, % | average incremental | final | CPU s |\n|---|---|---|---|---|")
    for name, results in found.items():
        tasks = zip(*(result.accuracies for result in results), strict=True)
        means = ", ".join(f"{statistics.mean(column):.1f}" for column in tasks)
        columns = [r.average for r in results], [r.accuracies[-1] for r in results]
        cells = [" ± ".join(f"{f(column):.1f}" for f in (statistics.mean, statistics.stdev)) for column in columns]
        print(f"| {name} | {means} | {' | '.join(cells)} | {statistics.median(r.cpu_s for r in results):.0f} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=Path, help="a clone of SaraBabakN/MFCL-NeurIPS23")
    parser.add_argument("--seeds", default="0,1,2,3", help="at least two")
    parser.add_argument("--jobs", type=int, default=joblib.cpu_count())
    parser.add_argument("--data-root", type=Path, default=Path(os.environ.get("FEDCIL_DATA_ROOT", "data")))
    parser.add_argument("--output", type=Path, default=Path("runs/authors"))
    given = parser.parse_args()
    require_program(given.program)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    given.output.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(given.jobs) as pool:
        pairs = [
            (
                pool.submit(theirs, given.program, seed, given.data_root, given.output),
                pool.submit(ours, seed, given.data_root, given.output),
            )
            for seed in seeds
        ]
        found = {
            "the released program": [there.result() for there, _ in pairs],
            "fedcil, `authors-code`": [here.result() for _, here in pairs],
        }
    print_table(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
