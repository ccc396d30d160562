"""What a client's step costs: the released program's, that of the benchmark's twin of it, and fedcil's.

    python -m scenarios.authors.cost DIR [--repeats 5]

DIR is a clone of SaraBabakN/MFCL-NeurIPS23. ResNet-18, fp32, CPU seconds of a batch on one core, in turn in a process:
with the memory allocator as the C library has it, and with fedcil's setting for all three. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch

from fedcil.allocator import keep_freed_memory
from fedcil.methods.mfcl import MFCL
from scenarios.authors.program import open_program
from scenarios.authors.steps import teacher_of_the_program
from scenarios.benchmarks.plain import Pictures
from scenarios.benchmarks.step import FULL, QUICK, RELEASED, TASK, TRAINING, Sizes, our_step, plain_step, stored_images
from scenarios.benchmarks.timing import against, in_turn, median_cpu, timed

SETTINGS = MFCL(**RELEASED)


def their_step(sizes: Sizes) -> Callable[[], object]:
    """Local training on one batch of pictures, as the program's server asks for it."""
    from clients.MFCL import MFCL_client
    from models.generator import CIFAR_GEN
    from models.myNetwork import network
    from models.ResNet import ResNet18

    classifier = network(TASK.old, ResNet18(100, cifar=True))
    head, student = deepcopy(classifier.fc), deepcopy(classifier)
    student.Incremental_learning(TASK.seen)
    teacher = teacher_of_the_program(classifier, CIFAR_GEN(), TASK.old)
    samples = stored_images(sizes.real)
    pictures = Pictures(samples.images.numpy(), samples.labels.numpy())
    groups = [list(range(sizes.real))]  # of each task
    client = MFCL_client(sizes.real, 1, pictures, groups, SETTINGS.w_kd, SETTINGS.w_ft, sizes.synthetic, "CIFAR100")
    client.set_next_t()
    client.last_valid_dim, client.valid_dim = TASK.old, TASK.seen
    return lambda: client.train(deepcopy(student), TRAINING.lr, (teacher, head), None, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=Path, help="a clone of SaraBabakN/MFCL-NeurIPS23")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    open_program(given.program)
    cases = {
        (size.name, name): timed(step)
        for size in (QUICK, FULL)
        for name, step in {
            "the released program": their_step(size),
            "its twin": plain_step(size),
            "fedcil": our_step(size, "fp32", 0),
        }.items()
    }
    print("| real, synthetic | freed memory | program | CPU s | fedcil over it | spread |\n|---|---|---|---|---|---|")
    for memory in ("as the C library has it", "kept"):
        if memory == "kept":
            keep_freed_memory()
        costs = in_turn(cases, given.repeats)
        for (size, name), found in costs.items():
            figure = against(costs[size, "fedcil"], found)
            real, synthetic = size.split("_")
            row = f"{median_cpu(found):.2f} | {figure.ratio:.2f} | {figure.spread or 0:.0%}"
            print(f"| {real}, {synthetic} | {memory} | {name} | {row} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
