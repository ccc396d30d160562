"""The ladder: MFCL's client step in all its forms, measured in turn in one run. Needs neither flwr nor ray.

    python -m scenarios.benchmarks.ladder OUT [--device cuda|cpu] [--tiny] [--rungs a,b] [--repeats N] [--max-seconds S]

Each rung is checked in float64 on a narrow network against the first (weights after a round), compared in fp32 at full
size, opened in its own precision (time of the first round: captures and compilation are in it; memory), and then
timed with the others in turn. A rung that fails is reported with its reason and stops no other. ``OUT/ladder.json`` is
written after every stage; the table is printed last. Equal means: no tensor differs in float64 by more than ``EQUAL``
of its largest change in the round. In fp32 the same number is shown and not judged: train-mode batch norm
makes rounding large within a few steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fedcil.compute import Precision, apply_precision, resolve_device, resolve_precision
from fedcil.tensors import Tensors
from scenarios.benchmarks import machine
from scenarios.benchmarks.material import EXACT, PAPER, TINY, Material, Work, plain_networks
from scenarios.benchmarks.rungs import POOLS, RUNGS, Round, Rung

EQUAL = 1e-8  # largest difference of a tensor in float64, over its largest change in the round
STILL = 1e-12  # a tensor that changed by less (a bias before a batch norm) is noise
TINY_POOL = 32

Row = dict[str, Any]


class Ladder:
    """The rows of a run, and what is open for timing."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = resolve_device(options.device)
        self.work: Work = TINY if options.tiny else PAPER
        self.tiny, self.folder, self.repeats = options.tiny, options.out, options.repeats
        self.until = time.monotonic() + options.max_seconds
        names = options.rungs.split(",") if options.rungs else list(RUNGS)
        self.rungs = {name: RUNGS[name] for name in names}
        self.rows: dict[str, Row] = {name: {"what": rung.what} for name, rung in self.rungs.items()}
        self.seconds: dict[str, list[float]] = {}
        self.expected: dict[tuple[str, str], tuple[Tensors, Tensors]] = {}
        self.rates: dict[str, float] = {}

    def attempt(self, name: str, stage: str, work: Callable[[], None]) -> bool:
        """``work``, or the reason why not in the row; False if it did not end well."""
        try:
            if time.monotonic() > self.until:
                raise TimeoutError("--max-seconds were up")
            work()
        except Exception as error:
            self.rows[name]["failed"] = f"{stage}: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
            (self.folder / "failures.log").open("a").write(f"--- {name}, {stage}\n{traceback.format_exc()}\n")
        self.release()
        self.save()
        return "failed" not in self.rows[name]

    def check(self, name: str, rung: Rung) -> None:
        """Weights after one round against those of the base: float64 and narrow, then fp32 and in full size."""
        with float64():
            self.rows[name]["float64_difference"] = self.difference(name, rung, EXACT, "float64")
        self.rows[name]["equal"] = self.rows[name]["float64_difference"] <= EQUAL
        self.release()
        self.rows[name]["fp32_difference"] = self.difference(name, rung, self.work, "fp32")

    def difference(self, name: str, rung: Rung, work: Work, kind: str) -> float:
        found = self.weights(rung, work)
        if (kind, rung.base) not in self.expected:
            base = RUNGS[rung.base]
            weights = found if name == rung.base else self.weights(base, work)
            self.expected[kind, rung.base] = (weights, base.start(Material(work, "fp32", self.device)))
        return differ(found, *self.expected[kind, rung.base])

    def weights(self, rung: Rung, work: Work) -> Tensors:
        with settings("fp32", rung):
            return rung.open(Material(work, "fp32", self.device))()

    def open(self, name: str, rung: Rung, opened: dict[str, Round]) -> None:
        before, started = self.memory_now(), time.perf_counter()
        precision = resolve_precision(rung.precision, self.device)
        pool = TINY_POOL if self.tiny and name in POOLS else POOLS.get(name, 0)
        with settings(precision, rung):
            opened[name] = rung.open(Material(self.work, precision, self.device, pool))
            opened[name]()
            self.wait()
        row = self.rows[name]
        row |= {"precision": precision, "first_round_s": time.perf_counter() - started}
        if self.device.type == "cuda":
            row["memory_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        self.seconds[name] = []
        self.time(name, rung, opened[name])  # one figure at least, whatever later rungs do to the device

    def time(self, name: str, rung: Rung, round_: Round) -> None:
        with settings(self.rows[name]["precision"], rung):
            started = time.perf_counter()
            round_()
            self.wait()
            self.seconds[name].append(time.perf_counter() - started)

    def run(self) -> None:
        opened: dict[str, Round] = {}
        for name, rung in self.rungs.items():
            print(f"ladder: {name}", file=sys.stderr, flush=True)
            if rung.exact and not self.attempt(name, "check", lambda n=name, r=rung: self.check(n, r)):
                continue
            if not self.attempt(name, "open", lambda n=name, r=rung: self.open(n, r, opened)):
                opened.pop(name, None)
        for repeat in range(self.repeats):
            names = list(opened)
            for name in names[repeat % len(names) :] + names[: repeat % len(names)] if names else []:
                if time.monotonic() > self.until:
                    return
                if not self.attempt(name, "time", lambda n=name: self.time(n, self.rungs[n], opened[n])):
                    del opened[name]

    def finish(self) -> None:
        """Steps per second, and useful FLOP/s over the rate of a matrix product in the same precision."""
        useful = flops(self.work, self.device)
        for name, seconds in self.seconds.items():
            row, rung = self.rows[name], self.rungs[name]
            if not seconds:
                continue
            kind = "generator" if rung.base == "generator" else "pool" if name in POOLS else "step"
            steps = self.work.generator_steps if kind == "generator" else self.work.steps
            rate = self.rates.setdefault(row["precision"], matrix_rate(row["precision"], self.device, self.tiny))
            median = statistics.median(seconds)
            row["steps_per_s"] = steps / median
            row["spread"] = (max(seconds) - min(seconds)) / median
            row["tflops"] = useful[kind] / median / 1e12
            row["of_matrix_rate"] = row["tflops"] / rate
        self.save()

    def save(self) -> None:
        content = {
            "machine": machine.describe({}),
            "device": device_name(self.device),
            "work": self.work.model if self.tiny else "paper",
            "matrix_tflops": self.rates,
            "equal_below": EQUAL,
            "rungs": self.rows,
            "seconds": self.seconds,
        }
        (self.folder / "ladder.json").write_text(json.dumps(content, indent=1))

    def release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory_now(self) -> int:
        """Bytes on the device; the peak counts from here."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()


def differ(found: Tensors, expected: Tensors, start: Tensors) -> float:
    """Largest difference of a tensor over the largest change that the round made in that tensor."""
    differences = [float((found[name] - tensor).abs().max()) for name, tensor in expected.items()]
    changes = [float((tensor - start[name]).abs().max()) for name, tensor in expected.items()]
    return max(one / change for one, change in zip(differences, changes, strict=True) if change > STILL)


@contextmanager
def settings(precision: Precision, rung: Rung) -> Iterator[None]:
    apply_precision(precision)
    torch.backends.cudnn.benchmark = rung.autotune
    try:
        yield
    finally:
        apply_precision("fp32")
        torch.backends.cudnn.benchmark = False


@contextmanager
def float64() -> Iterator[None]:
    """fedcil computes in torch's default type."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def flops(work: Work, device: torch.device) -> dict[str, float]:
    """Useful FLOPs of a round: merged passes, whatever a rung does beyond them."""
    material = Material(work, "fp32", device)
    student, _, generator = plain_networks(material)
    images = torch.zeros(2, 3, 32, 32, device=device)
    per_image = counted(lambda: student(images)) / 2
    per_latent = counted(lambda: generator(torch.zeros(2, work.latent, device=device))) / 2
    real, made = work.clients * work.samples, work.steps * work.synthetic
    drawn = work.generator_steps * material.settings.generator_batch
    return {
        "step": 4 * per_image * (real + made) + per_latent * made,
        "pool": 3 * per_image * (real + made) + per_image * real,
        "generator": drawn * (2 * per_image + 3 * per_latent),
    }


@torch.no_grad()
def counted(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def matrix_rate(precision: Precision, device: torch.device, tiny: bool) -> float:
    """TFLOP/s of a square matrix product, the best of five."""
    size = 256 if tiny else 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    one = torch.randn(size, size, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))
    apply_precision(precision)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        one @ one
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    apply_precision("fp32")
    return 2 * size**3 / min(seconds) / 1e12


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


COLUMNS = {
    "steps_per_s": "steps/s",
    "tflops": "TFLOP/s",
    "of_matrix_rate": "of matrix rate",
    "memory_mb": "MB",
    "first_round_s": "first round s",
    "float64_difference": "float64 diff",
    "fp32_difference": "fp32 diff",
}


def print_table(rows: dict[str, Row], device: str) -> None:
    print(f"\n| rung on {device} | precision | {' | '.join(COLUMNS.values())} | |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    for name, row in rows.items():
        cells = [f"{row[key]:.3g}" if key in row else "-" for key in COLUMNS]
        differs = "" if row.get("equal", True) else "NOT EQUAL; "
        note = differs + (f"failed: {row['failed']}" if "failed" in row else row["what"])
        print(f"| {name} | {row.get('precision', '-')} | {' | '.join(cells)} | {note} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="sizes for trying the script itself")
    parser.add_argument("--rungs", help=", ".join(RUNGS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-seconds", type=float, default=540.0)
    options = parser.parse_args()
    if strange := [name for name in (options.rungs or "").split(",") if name and name not in RUNGS]:
        parser.error(f"--rungs: no rung {', '.join(strange)}; allowed: {', '.join(RUNGS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    ladder = Ladder(options)
    ladder.run()
    ladder.finish()
    print_table(ladder.rows, device_name(ladder.device))
    return 0 if any(ladder.seconds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
