"""(c) What an engine costs: a round with clients that do no step and send back the model that they got.

CPU seconds are those of all processes of a side, for one client; a repeat is as many rounds as take a second.
fedcil's inline and Ray engines (``peers/engine.py``) against Flower's stock simulation with a client that returns the
arrays of its message (``peers/flower_empty.py``).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from scenarios.benchmarks.peers.session import Session
from scenarios.benchmarks.timing import Case, Figure, against, in_turn

LIMIT_S = 20.0  # for the repeats of one row; the last one begun is finished
PYTHON = Path(sys.executable)


def measure(
    engines: Sequence[str], clients: int, megabytes: int, repeats: int, log: Path, *, flower: bool
) -> dict[str, Figure]:
    """``engine_<engine>_<megabytes>mb_<clients>_vs_flower`` for each engine, all in turn; without Flower only what ours
    cost.
    """
    with ExitStack() as stack:
        cases: dict[str, Case] = {}
        for name in (*engines, *(["flower"] if flower else [])):
            program = "flower_empty" if name == "flower" else "engine"
            session = Session(PYTHON, program, str(clients), str(megabytes), name, log)
            stack.callback(session.close)
            cases[name] = session.case(clients)
        costs = in_turn(cases, repeats, limit_s=LIMIT_S)
    theirs = costs.get("flower")
    return {f"engine_{name}_{megabytes}mb_{clients}_vs_flower": against(costs[name], theirs) for name in engines}
