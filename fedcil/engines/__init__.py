"""Engines: each joins one server loop to clients somewhere, and ends what it started.

An engine is a function ``serve(setting, loop)`` that opens a port and hands it to ``loop``. The table is explicit;
nothing is imported until a scenario names it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from fedcil.allocator import keep_freed_memory
from fedcil.errors import ScenarioError
from fedcil.experiment import Experiment
from fedcil.port import Port, StopSignal

ENGINES = {"inline": "fedcil.engines.inline", "ray": "fedcil.engines.ray", "flower": "fedcil.engines.flower"}


@dataclass(frozen=True, slots=True)
class Setting:
    """What an engine needs to know to start workers anywhere."""

    experiment: Experiment
    data_root: Path | None
    states: Path  # where simulated clients keep what they keep
    stop: StopSignal


def serve(setting: Setting, loop: Callable[[Port], None]) -> None:
    """Run ``loop`` over the engine that the scenario names."""
    keep_freed_memory()
    load_engine(setting.experiment.scenario.engine.name).serve(setting, loop)


def load_engine(name: str) -> ModuleType:
    """The engine's module; ScenarioError if a package that it needs is not installed."""
    try:
        return import_module(ENGINES[name])
    except ImportError as error:
        raise ScenarioError(
            f"engine.name = {name!r} needs a package that is not here: {error.name}",
            where="engine.name",
            allowed="inline, which needs nothing more",
            next="pip install 'flwr[simulation]' or set engine.name = 'inline'",
        ) from None
