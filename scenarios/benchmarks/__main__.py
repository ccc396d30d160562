"""Every benchmark, or the quick ones: a table, a figure, and a JSON file whose path is printed last.

    python -m scenarios.benchmarks [--quick] [--only step,rounds,...] [--repeats N] [--output DIR]

Parts: step, floor, boundary, rounds, overhead, workers, memory, whole; the JSON is written after each of them. Only
when named: resnet18_ten, the rounds of ResNet-18 with ten clients instead of two, a quarter of an hour by itself. Peers
get virtual environments below ``--output``/peers; one that cannot be installed is reported as not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fedcil import cpu
from fedcil.allocator import keep_freed_memory
from fedcil.compute import Precision
from scenarios.benchmarks import bars, boundary, floor, machine, memory, overhead, report, rounds, step, whole, workers
from scenarios.benchmarks.peers.environments import REQUIREMENTS, environment
from scenarios.benchmarks.peers.session import Session, sessions
from scenarios.benchmarks.timing import NOT_MEASURED, Figure

Rows = dict[str, Any]
LOOPS = {"plain": (), "plain_kept": ("kept",)}
BY_NAME_ONLY = ("resnet18_ten",)


class Bench:
    """The parts by name; each gives its rows."""

    def __init__(self, quick: bool, repeats: int, output: Path) -> None:
        self.quick, self.repeats, self.output = quick, repeats, output
        self.precisions: tuple[Precision, ...] = ("fp32", "bf16") if cpu.bf16_instructions() else ("fp32",)
        self.log = output / "peers.log"
        self.parts: dict[str, Callable[[], Rows]] = {
            "step": self.step,
            "rounds": self.rounds,
            "overhead": self.overhead,
        }
        if not quick:
            self.parts |= {
                "floor": self.floor,
                "boundary": self.boundary,
                "workers": self.workers,
                "memory": memory.measure,
                "whole": whole.measure,
                "resnet18_ten": lambda: self.resnet18(self.peers(), clients=10, limit_s=600),
            }

    def rows(self, name: str) -> Rows:
        """Of one part, as they are written."""
        found = self.parts[name]()
        if "bf16" not in self.precisions:
            found |= {key.replace("fp32", "bf16"): NOT_MEASURED for key in found if "fp32" in key}
        return {key: asdict(row) if isinstance(row, Figure) else row for key, row in found.items()}

    def step(self) -> Rows:
        rows: Rows = {}
        for sizes in (step.QUICK,) if self.quick else (step.SMALL, step.FULL):
            rows |= step.measure(sizes, self.repeats, self.log, self.precisions)
        return rows

    def floor(self) -> Rows:
        """Share of a fresh step's time that its convolutions alone would take."""
        return floor.measure(step.FULL, self.repeats, self.log, self.precisions)

    def boundary(self) -> Rows:
        return boundary.measure(128, self.repeats, self.log, self.precisions)

    def rounds(self) -> Rows:
        """Every net has processes of its own: one that has trained another before may be a tenth cheaper."""
        data, peers = rounds.write_data(self.output / "round.npz"), self.peers()
        with self.sides(peers, data) as (ours, sides):
            rows = self.weights(data, sides) | rounds.measure("lenet", ours, sides, self.repeats, self.precisions)
        peers = {name: python if sides[name] else None for name, python in peers.items()}
        with self.sides(peers, data) as (ours, sides):
            rows |= rounds.measure("cnn4", ours, sides, self.repeats, self.precisions)
        return rows if self.quick else rows | self.resnet18(peers, clients=2, limit_s=180)

    def resnet18(self, peers: Mapping[str, Path | None], clients: int, limit_s: float) -> Rows:
        """Few clients, and a limit: a client takes seconds."""
        data = rounds.write_data(self.output / f"round{clients}.npz", clients)
        with self.sides(peers, data) as (ours, sides):
            return rounds.measure("resnet18", ours, sides, self.repeats, self.precisions, clients, limit_s)

    def weights(self, data: Path, sides: dict[str, Session | None]) -> Rows:
        """Of all but the plain loop against it; a side whose weights are others, or that cannot start, becomes None."""
        rows: Rows = {"weights_fedcil": rounds.agreement(rounds.weights_differ(data))}
        for name, side in sides.items():
            if side is None or name in LOOPS:
                continue
            try:
                rows[f"weights_{name}"] = rounds.agreement(rounds.weights_differ(data, side))
            except (RuntimeError, AssertionError) as error:
                print(f"{name} is not measured: {error}")
                sides[name] = None
        return rows

    def peers(self) -> dict[str, Path | None]:
        """Flower runs in this environment; the others have their own, or None."""
        others = () if self.quick else REQUIREMENTS
        return {"flower": Path(sys.executable)} | {name: environment(name, self.output / "peers") for name in others}

    @contextmanager
    def sides(
        self, peers: Mapping[str, Path | None], data: Path
    ) -> Iterator[tuple[Session, dict[str, Session | None]]]:
        """fedcil; and the plain loop, once as it comes and once with freed memory kept, and those peers that could be
        had, None for the others.
        """
        programs = {name: (python, name, data) for name, python in peers.items() if python}
        loops = {name: (sys.executable, "plain", data, *words) for name, words in LOOPS.items()}
        with sessions(self.log, {"ours": (sys.executable, "ours"), **loops, **programs}) as running:
            yield running["ours"], {name: running.get(name) for name in (*LOOPS, *peers)}

    def overhead(self) -> Rows:
        sizes = (((10, 100), 1),) if self.quick else (((10, 100, 1000), 1), ((10, 100), 45), ((1000,), 45))
        rows: Rows = {}
        for clients, megabytes in sizes:
            rows |= overhead.measure(clients, megabytes, self.repeats, self.log)
        return rows

    def workers(self) -> Rows:
        rows: Rows = {}
        for net in ("cnn4", "resnet18"):
            others = machine.used_by_others()
            rows |= workers.measure(net, self.repeats)
            if others > machine.BUSY:
                name = f"two_workers_{net}"
                rows[name] = replace(rows[name], wall_ratio=None)
                print(f"{name}: others use {others:.0%} of the cores, wall is not measurable", file=sys.stderr)
        return rows


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    keep_freed_memory()  # as ``fedcil run`` does; whatever it is held against is a process of its own
    options.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.quick, options.repeats, options.output.absolute())
    wanted = options.only.split(",") if options.only else [name for name in bench.parts if name not in BY_NAME_ONLY]
    if strange := [name for name in wanted if name not in bench.parts]:
        raise SystemExit(f"--only: no part {', '.join(strange)} here; allowed: {', '.join(bench.parts)}")
    path = options.output / ("quick.json" if options.quick else "bench.json")
    held_against = bars.QUICK if options.quick else bars.FULL
    rows: Rows = {}
    used: dict[str, float] = {}
    try:
        for name in wanted:
            used[name] = machine.used_by_others()
            print(f"measuring {name}, others use {used[name]:.0%} of the cores", file=sys.stderr, flush=True)
            rows |= bench.rows(name)
            path.write_text(
                json.dumps({"machine": machine.describe(REQUIREMENTS) | {"used_by_others": used}, **rows}, indent=1)
            )
    except KeyboardInterrupt:
        print(f"stopped: what was measured so far is in {options.output}", file=sys.stderr)
        return 130
    report.print_table(rows, held_against)
    if "bf16" not in bench.precisions:
        print("bf16 was not measured: this CPU has no instructions for it (avx512_bf16 or amx)")
    elif not cpu.fast_bf16():
        print("bf16's bars are out of reach of this CPU: without AMX it multiplies half as fast in bf16 as in fp32")
    report.draw(rows, held_against, options.output / "benchmark.png")
    print(path)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under 4 minutes")
    parser.add_argument("--only", help="parts, separated by commas")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/bench") / time.strftime("%Y%m%d-%H%M%S"))
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats: at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
