"""fedcil: federated class-incremental learning, simulated exactly, fast and resumable.

``fedcil.run("digits_mfcl")`` runs a scenario, ``fedcil.load(folder)`` reads what a run left behind.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedcil.api import load, resume, run
    from fedcil.record.run import Run
    from fedcil.scenario import Scenario
    from fedcil.scenario_file import load_scenario

__version__ = "0.1.0"
__all__ = ["Run", "Scenario", "load", "load_scenario", "resume", "run"]

_HOMES = {
    "Run": "fedcil.record.run",
    "Scenario": "fedcil.scenario",
    "load": "fedcil.api",
    "load_scenario": "fedcil.scenario_file",
    "resume": "fedcil.api",
    "run": "fedcil.api",
}


def __getattr__(name: str) -> Any:
    """Public names are loaded when used: importing fedcil costs neither torch nor pydantic."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fedcil' has no attribute {name!r}")
    from importlib import import_module

    from fedcil.neighbours import refuse_intruders

    refuse_intruders()
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# What the libraries below would otherwise do at import or start: report usage, look for updates, install.
for _name, _value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}.items():
    os.environ.setdefault(_name, _value)
del _name, _value
