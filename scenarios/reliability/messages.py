"""Messages that are lost, doubled, late and out of order, between the real port and the real ClientApp."""

from __future__ import annotations

import logging
from pathlib import Path

from fedcil.errors import TooFewClients
from fedcil.experiment import Experiment, open_experiment
from fedcil.scenario_file import load_scenario
from scenarios.reliability.common import Fault, Outcome
from scenarios.reliability.loopback import LoopbackGrid, Weather, run_over, violations
from server import nodes

OWED_S = 0.2  # a node whose answer was lost is asked again after this; 600 s where nothing is lost on purpose
TABLES = {
    "method": {"name": "fedavg"},
    "data": {"name": "synthetic", "classes": 4, "samples_per_class": 20, "image_size": 4, "test_per_class": 2},
    "stream": {"tasks": 2},
    "partition": {"name": "iid"},
    "clients": {"count": 5, "per_round": 5},
    "model": {"width": 2},
    "training": {"rounds": 3, "epochs": 1},
    "server": {"evaluate_every": 0, "deadline_s": 0.4, "patience": 100},
}
"""6 rounds of 5 nodes: 30 requests and as many answers."""


def open_small() -> Experiment:
    return open_experiment(load_scenario(TABLES))


def stormy(name: str, weather: Weather) -> Fault:
    def trial(seed: int, workdir: Path) -> Outcome:
        logging.getLogger("fedcil").setLevel(logging.ERROR)
        nodes.OWED_S = OWED_S
        grid = LoopbackGrid(5, workdir / "nodes", weather, seed)
        try:
            run = run_over(grid, open_small(), workdir / "runs")
        except TooFewClients:
            return Outcome(False, "too few clients")
        found = violations(run, grid.ledger)
        return Outcome(not found, found[0] if found else "every update counted once, in its round")

    return Fault(name, "each update counted once, in its own round; the run ends", trial, 100)


FAULTS = (
    stormy("messages_lost", Weather(lost_requests=0.25, lost_replies=0.25)),
    stormy("messages_late", Weather(delayed=0.5, reordered=True)),
    stormy(
        "messages_storm", Weather(lost_requests=0.25, lost_replies=0.25, doubled=0.25, delayed=0.25, reordered=True)
    ),
)
