"""A node joins a Ray cluster in the middle of a run and leaves again: more workers for a while, the same metrics.

    python -m scenarios.scalability.nodes [--output runs/scalability]

Ray's own cluster of several nodes on one machine. Exit code 1 if the metrics differ from the inline engine's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # read when ray is imported, and starts

import ray
from ray.cluster_utils import Cluster

import fedcil
from scenarios.scalability.common import (
    Panel,
    Table,
    command,
    draw,
    environment,
    fit,
    middle,
    new_folder,
    options,
    say_load,
)

SCENARIO = "digits_mfcl"
TASK_ROUNDS = 4
OVERRIDES = [
    "data={name='synthetic', classes=100, samples_per_class=60, test_per_class=2}",
    "stream.tasks=50",  # however fast the machine is: both runs are stopped when there is enough to see
    f"training.rounds={TASK_ROUNDS}",
    "training.epochs=40",
    "method={name='mfcl', preset='small', steps=5, pool=64}",
]
NODE = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
ROUNDS = 8  # with one worker, with two, and with one again: two tasks of each
LIMIT_S = 170.0  # of the run on the cluster
LOOK_S = 0.1
STOPPED = 143  # exit code of a run that SIGTERM ended


class Watch:
    """The run on the cluster, looked at from outside: rounds recorded, workers alive."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path, workers: Callable[[], int]) -> None:
        self.process, self.output, self.workers = process, output, workers
        self.end = time.monotonic() + LIMIT_S
        self.workers_in_round: list[int] = []  # as each round's line was seen

    def rounds(self) -> int:
        files = [path.read_bytes() for path in self.output.glob("*/metrics.jsonl")]
        return sum(content.count(b'"kind": "round"') for content in files)

    def look(self) -> tuple[int, int]:
        """(rounds, workers) now."""
        rounds, alive = self.rounds(), self.workers()
        if self.process.poll() is not None and self.workers_in_round:  # its workers went with it
            alive = self.workers_in_round[-1]
        self.workers_in_round += [alive] * (rounds - len(self.workers_in_round))
        return rounds, alive

    def until(self, what: str, reached: Callable[[int, int], bool]) -> int:
        """Wait; returns the rounds recorded then. RuntimeError if the run ends or takes too long before."""
        while True:
            ended = self.process.poll() is not None
            rounds, alive = self.look()
            if reached(rounds, alive):
                return rounds
            if ended or time.monotonic() > self.end:
                state = f"ended with {self.process.returncode}" if ended else f"took more than {LIMIT_S:g} s"
                raise RuntimeError(f"the run {state} before {what} ({rounds} rounds, {alive} workers)")
            time.sleep(LOOK_S)

    def stop(self) -> None:
        """As a person would: the run saves a checkpoint, says so, and ends with 143."""
        print("enough rounds: the run is stopped", flush=True)
        self.process.terminate()
        code = self.process.wait(timeout=60)
        if code != STOPPED:
            raise RuntimeError(f"the run ended with exit code {code} instead of {STOPPED}")
        self.look()  # a round may have ended meanwhile


def workers() -> int:
    """Workers on the cluster: each holds one CPU."""
    return int(ray.cluster_resources().get("CPU", 0.0) - ray.available_resources().get("CPU", 0.0))


def on_a_cluster_that_changes(folder: Path) -> tuple[Path, list[int]]:
    """(run folder, workers at the end of each round)."""
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    process = None
    try:
        overrides = [*OVERRIDES, "engine.name='ray'", f"engine.address='{cluster.address}'"]
        process = subprocess.Popen(
            command("run", SCENARIO, overrides, "--no-figures", "--output", str(folder)),
            env=environment(),
            stdout=subprocess.DEVNULL,
        )
        watch = Watch(process, folder, workers)
        first = watch.until(f"{ROUNDS} rounds", lambda rounds, _: rounds >= ROUNDS)
        print(f"round {first}: a node joins", flush=True)
        node = cluster.add_node(**NODE)
        two = watch.until("a second worker", lambda _, alive: alive >= 2)
        print(f"round {two}: two workers", flush=True)
        left = watch.until(f"{ROUNDS} rounds with two workers", lambda rounds, _: rounds >= two + ROUNDS)
        print(f"round {left}: the node leaves", flush=True)
        cluster.remove_node(node)
        watch.until(f"{ROUNDS} rounds without it", lambda rounds, _: rounds >= left + ROUNDS)
        watch.stop()
    finally:
        if process and process.poll() is None:
            process.kill()
            process.wait()
        ray.shutdown()
        cluster.shutdown()
    (path,) = (path.parent for path in folder.glob("*/metrics.jsonl"))
    return path, watch.workers_in_round


def inline(folder: Path, rounds: int) -> Path:
    """The same run on the inline engine, for at least so many rounds."""
    process = subprocess.Popen(
        command("run", SCENARIO, [*OVERRIDES, "engine.workers=1"], "--no-figures", "--output", str(folder)),
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    try:
        watch = Watch(process, folder, lambda: 1)
        watch.until(f"{rounds} rounds", lambda seen, _: seen >= rounds)
        watch.stop()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    (path,) = (path.parent for path in folder.glob("*/metrics.jsonl"))
    return path


def main() -> int:
    given = options(__doc__).parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is taken down then, too
    say_load()
    path, alive = on_a_cluster_that_changes(new_folder(given.output, "nodes-ray"))
    table, spent = Table("nodes"), [line["cost"]["seconds"] for line in fedcil.load(path).kind("round")]
    table.rows += [("nodes", float(at), 0, "seconds", value) for at, value in enumerate(spent)]
    table.rows += [("nodes", float(at), 0, "workers", float(value)) for at, value in enumerate(alive)]
    table.write(given.output / "nodes.csv")
    rounds = [float(at) for at in range(len(spent))]
    later = TASK_ROUNDS  # the first task has no synthetic images, and its rounds cost less
    a, b = fit([float(value) for value in alive[later:]], spent[later:])
    one, two = (middle(s for s, count in zip(spent[later:], alive[later:], strict=True) if count == n) for n in (1, 2))
    print(f"wall seconds of a round, medians: {one:.3g} with one worker, {two:.3g} with two")
    print(f"fit (least squares): wall seconds of a round = {a:.4g} s + {b:.4g} s per worker")
    ideal = [one / max(1, count) for count in alive]
    draw(
        given.output / "nodes.png",
        "A node comes and goes in a run",
        [
            Panel(
                {"round": (rounds, spent)},
                {"ideal: one worker's, shared by all": (rounds, ideal)},
                "round",
                "wall seconds",
                log=(False, False),
                zero=True,
            ),
            Panel(
                {"workers": (rounds, [float(value) for value in alive])},
                {"one worker": (rounds, [1.0] * len(rounds))},
                "round",
                "Ray workers as the round ended",
                log=(False, False),
                zero=True,
            ),
        ],
    )
    seen = fedcil.load(path).results
    boundaries = sum(line["kind"] == "boundary" for line in seen)
    one_more = len(spent) + 1  # the last round may have ended a task: what stands after it is there then, too
    alone = fedcil.load(inline(new_folder(given.output, "nodes-inline"), one_more))
    same = seen == alone.results[: len(seen)]
    print(f"most workers at once: {max(alive)}; at the end of the last round: {alive[-1]}")
    print(f"same metrics as inline: {'yes' if same else 'no'}, over {boundaries} boundaries")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
