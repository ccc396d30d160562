"""Faults, each with the outcome that is required: resumed to identical metrics, or a clear error and a checkpoint.

    python -m scenarios.reliability.faults [--trials N] [--only NAME ...] [--seed 0] [--output faults.json]

A fault is a function ``(seed, workdir) -> Outcome`` in one of the tables below; to add one, write the function
beside its like and give it a line in that file's ``FAULTS``. Without ``--trials`` each fault has its own number.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from scenarios.reliability import churn, deployment, disk, kills, messages, ray_kills
from scenarios.reliability.common import Fault, Outcome

FAULTS: tuple[Fault, ...] = (
    *kills.FAULTS,
    *ray_kills.FAULTS,
    *disk.FAULTS,
    *messages.FAULTS,
    *churn.FAULTS,
    *deployment.FAULTS,
)


def attempt(fault: Fault, seed: int) -> Outcome:
    """One trial in a folder of its own, which goes away if all went well."""
    workdir = Path(tempfile.mkdtemp(prefix=f"{fault.name}-"))
    try:
        outcome = fault.trial(seed, workdir)
    except Exception as error:
        outcome = Outcome(False, f"the trial itself broke: {type(error).__name__}: {error}")
    if outcome.passed:
        shutil.rmtree(workdir, ignore_errors=True)
        return outcome
    return Outcome(False, f"{outcome.what} (seed {seed}, {workdir})", outcome.recovery_s)


def examine(fault: Fault, trials: int | None, seed: int) -> dict[str, Any]:
    """All trials of a fault as one row of the result."""
    wanted = trials if trials is not None else fault.trials
    if fault.most is not None:
        wanted = min(wanted, fault.most())
    started, outcomes = time.monotonic(), []
    for number in range(wanted):
        outcomes.append(attempt(fault, seed + number))
        if not outcomes[-1].passed:
            print(f"{fault.name}: {outcomes[-1].what}", file=sys.stderr, flush=True)
    recoveries = [outcome.recovery_s for outcome in outcomes if outcome.recovery_s is not None]
    return {
        "trials": len(outcomes),
        "passed": sum(outcome.passed for outcome in outcomes),
        "required": fault.required,
        "places": fault.most() if fault.most else None,
        "outcomes": dict(Counter(outcome.what for outcome in outcomes).most_common()),
        "recovery_s": {"median": round(statistics.median(recoveries), 2), "max": round(max(recoveries), 2)}
        if recoveries
        else None,
        "seconds": round(time.monotonic() - started, 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=None)
    parser.add_argument("--only", nargs="*", default=None, metavar="NAME", help=", ".join(f.name for f in FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("faults.json"))
    given = parser.parse_args(arguments)
    chosen = [fault for fault in FAULTS if given.only is None or fault.name in given.only]
    unknown = set(given.only or ()) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    result: dict[str, Any] = {}
    for fault in chosen:
        result[fault.name] = examine(fault, given.trials, given.seed)
        given.output.write_text(json.dumps(result, indent=1))  # what was found so far outlives a break
        print(f"{fault.name}: {json.dumps(result[fault.name])}", flush=True)
    return 0 if all(row["passed"] == row["trials"] for row in result.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
