"""Several runs: one after another, or side by side, each in a process of its own (the hidden
command ``one-of-several``) and on its share of the cores.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedcil.cli.runs import Options, Wanted, finished_already, reuse
from fedcil.errors import FedcilError, RunFailed, Stopped, rebuilt

if TYPE_CHECKING:
    from fedcil.port import StopSignal
    from fedcil.record.run import Run

POLL_S = 0.1


def finished_runs(wanted: Sequence[Wanted], jobs: int, output: Path, options: Options) -> list[Run]:
    """One for each that is ``wanted``: found below ``output``, continued, or made, ``jobs`` at a time."""
    from fedcil.record.run import open_run

    checked = [(each, each.identity(options.data_root)) for each in wanted]  # all of them before the first one runs
    if jobs == 1:
        return [reuse(*each, output, options) for each in checked]
    found = [finished_already(*each, output, options) for each in checked]
    missing = [each for each, run in zip(wanted, found, strict=True) if run is None]
    made = iter(side_by_side(missing, jobs, output, options))
    return [run or open_run(next(made)) for run in found]


class Part:
    """A run under way in a process that ends with this one. Signals do not reach it: who has started it stops it."""

    def __init__(self, wanted: Wanted, cores: int, output: Path, options: Options) -> None:
        self.label = f"{wanted.scenario.name} seed {wanted.scenario.seed}"
        words = [wanted.source, "--json", "--output", str(output), "--label", "" if options.quiet else self.label]
        words += [part for override in wanted.overrides for part in ("--set", override)]
        words += ["--data-root", str(options.data_root)] if options.data_root else []
        words += [] if options.figures else ["--no-figures"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fedcil", "one-of-several", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"LOKY_MAX_CPU_COUNT": str(cores)},  # joblib's bound, by which workers are counted
            process_group=0,
        )

    @property
    def over(self) -> bool:
        return self.process.poll() is not None

    def stop(self) -> None:
        """With a checkpoint, after the step that it is in."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def result(self) -> Path | FedcilError:
        """Of a part that is over: the run's folder, or what ended it."""
        assert self.process.stdout is not None
        with self.process:
            said = self.process.stdout.read()
        try:
            answer = json.loads(said)
        except ValueError:
            return RunFailed(
                f"the run's process ended with {self.process.returncode}",
                where=self.label,
                next="look for a lack of memory (`dmesg`), then give the same command with fewer --jobs",
            )
        if "error" in answer:
            return rebuilt(answer["error"] | {"exit_code": self.process.returncode})
        return Path(answer["run"])


def side_by_side(wanted: Sequence[Wanted], jobs: int, output: Path, options: Options) -> list[Path]:
    """Folders of the finished runs, in the order of ``wanted``; ``jobs`` of them are under way at any time.

    Raises Stopped, or what ended the first of those that failed, once all others have come to their end.
    """
    from joblib import cpu_count

    jobs = min(jobs, len(wanted))
    left, going, results = deque(enumerate(wanted)), dict[int, Part](), dict[int, Path | FedcilError]()
    try:
        while going or (left and not options.stop.asked):
            while left and len(going) < jobs and not options.stop.asked:
                place, each = left.popleft()
                going[place] = Part(each, max(1, cpu_count() // jobs), output, options)
            time.sleep(POLL_S)
            for place in [place for place, part in going.items() if part.over]:
                results[place] = going.pop(place).result()
            if options.stop.asked:
                for part in going.values():
                    part.stop()
    finally:  # at a second Ctrl-C some are left; as safe as any kill
        for part in going.values():
            part.process.kill()
    ended = [results[place] for place in sorted(results)]
    failed = [result for result in ended if isinstance(result, FedcilError)]
    if options.stop.event.is_set() and (left or failed):
        stopped = Stopped(options.stop.exit_code[0])
        stopped.next = "the same command goes on with all runs that are not finished"
        raise stopped
    if failed:
        raise failed[0]
    return [result for result in ended if isinstance(result, Path)]


def stop_with_stdin(stop: StopSignal) -> None:
    """In such a process: stop when whoever has started it says so, or is no more."""

    def wait() -> None:
        os.read(0, 1)  # not sys.stdin, whose lock would be held while Python ends
        stop.set(128 + signal.SIGTERM)

    threading.Thread(target=wait, name="stdin", daemon=True).start()
