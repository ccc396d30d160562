"""What a run's loop works with: the experiment, a port, a folder, and who looks on."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fedcil.experiment import Experiment
from fedcil.messages import Outcome, Request
from fedcil.port import Port, StopSignal
from fedcil.record.folder import RunFolder
from server.evaluation import Evaluator


class Watcher(Protocol):
    """Somebody who looks on: a progress display, or nobody."""

    def recorded(self, line: Mapping[str, Any]) -> None: ...

    def client_done(self, client: int) -> None: ...

    def boundary_step(self, step: int, steps: int, terms: Mapping[str, float]) -> None: ...


class Nobody:
    """The watcher of a run that nobody looks at."""

    def recorded(self, line: Mapping[str, Any]) -> None:
        pass

    def client_done(self, client: int) -> None:
        pass

    def boundary_step(self, step: int, steps: int, terms: Mapping[str, float]) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Session:
    """What the loop works with and never changes."""

    experiment: Experiment
    port: Port
    folder: RunFolder
    watcher: Watcher
    stop: StopSignal
    evaluator: Evaluator

    def ask(self, request: Request, deadline_s: float | None) -> Outcome:
        """What comes of it; the sum is on the device: from elsewhere it comes on the CPU."""
        outcome = self.port.run(request, deadline_s, self.watcher.client_done)
        return replace(outcome, total=outcome.total and outcome.total.to(self.experiment.compute.device))

    def show(self, line: Mapping[str, Any]) -> None:
        """To the watcher, who may do with it what it likes: the record is another."""
        self.watcher.recorded(deepcopy(line))

    def progress(self, step: int, steps: int, terms: Mapping[str, float]) -> None:
        self.stop.check()
        self.watcher.boundary_step(step, steps, terms)


def open_session(
    experiment: Experiment,
    folder: RunFolder,
    port: Port,
    watcher: Watcher | None = None,
    stop: StopSignal | None = None,
) -> Session:
    """A session over an engine's port, with the test images loaded."""
    stop = stop or StopSignal()
    return Session(
        experiment=experiment,
        port=port,
        folder=folder,
        watcher=watcher or Nobody(),
        stop=stop,
        evaluator=Evaluator(experiment, stop.check),
    )
