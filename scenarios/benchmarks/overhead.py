"""(c) What an engine costs: a round with clients that do no step and send back the model that they got.

CPU seconds are those of all processes of a side, for one client; a repeat is as many rounds as take a second.
fedcil's inline and Ray engines (``peers/engine.py``) against Flower's stock simulation with a client that returns the
arrays of its message (``peers/flower_empty.py``).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from scenarios.benchmarks.peers.session import Session, sessions
from scenarios.benchmarks.timing import Figure, against, in_turn

ENGINES = ("inline", "ray")
LIMIT_S = 20.0  # for the repeats of one row; the last one begun is finished
FLOWER_HOLDS = 2.5  # times all replies of a round: 10 GB with 100 of 45 MB


def measure(
    clients: Sequence[int], megabytes: int, repeats: int, log: Path, engines: Sequence[str] = ENGINES
) -> dict[str, Figure]:
    """``engine_<engine>_<megabytes>mb_<clients>_vs_flower`` for each engine and number of clients; where these are too
    much for Flower only what ours cost.
    """
    programs = {name: (sys.executable, "engine", str(megabytes), name) for name in engines}
    if FLOWER_HOLDS * max(clients) * megabytes * 1e6 < psutil.virtual_memory().available:
        programs["flower"] = (sys.executable, "flower_empty", str(megabytes))
    figures: dict[str, Figure] = {}
    with sessions(log, programs) as sides:
        for count in clients:
            figures |= _row(sides, count, megabytes, repeats)
    return figures


def _row(sides: Mapping[str, Session], clients: int, megabytes: int, repeats: int) -> dict[str, Figure]:
    """All in turn."""
    for side in sides.values():
        side.begin(clients)
    cases = {name: side.case(clients) for name, side in sides.items()}
    costs = in_turn(cases, repeats, warm_up=0, limit_s=LIMIT_S)  # warm by its beginning
    theirs = costs.pop("flower", None)
    return {f"engine_{name}_{megabytes}mb_{clients}_vs_flower": against(ours, theirs) for name, ours in costs.items()}
