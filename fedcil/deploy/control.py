"""Flower's command line as functions: to submit a run, look at it, stop it, and register nodes."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcil.deploy.health import healthy
from fedcil.deploy.pki import Pki
from fedcil.deploy.processes import executable, flower_environment
from fedcil.errors import FedcilError, RunFailed
from fedcil.port import StopSignal

START_S = 120.0  # until a SuperLink that was started is healthy
POLL_S = 0.2
ANSWER_S = 60.0  # each call is a process that costs about a second of CPU
APP = Path(__file__).parent / "app"
CONNECTION = "fedcil"
UNKNOWN = "unknown"
NO_SUCH_RUN = "Run ID not found"
KNOWN = "already"  # in the answer to a key that is registered


class ControlFailed(FedcilError):
    """The SuperLink cannot be reached, or refuses what it was asked."""

    kind = "control_failed"


@dataclass(frozen=True, slots=True)
class Control:
    """A SuperLink at ``address`` (host:port), trusted by ``ca``; ``home`` is Flower's own folder here."""

    address: str
    ca: Path
    home: Path

    def healthy(self) -> bool:
        return healthy(f"https://{self.address}/health", self.ca)

    def submit(self, config: Mapping[str, str | int]) -> str:
        """Start the app; returns Flower's id of the run."""
        words = [f"{key}={json.dumps(value)}" for key, value in config.items()]
        answer = self._call(["run", str(APP), CONNECTION, "-c", " ".join(words)])
        return str(answer["run-id"])

    def status(self, run: str) -> str:
        """``running``, ``finished:completed``, ``finished:failed``, ...; ``unknown`` if there is no such run."""
        try:
            answer = self._call(["list", CONNECTION, "--run-id", run])
        except ControlFailed as error:
            if NO_SUCH_RUN in error.what:
                return UNKNOWN
            raise
        return str(answer["runs"][0]["status"])

    def stop(self, run: str) -> None:
        self._call(["stop", run, CONNECTION])

    def register(self, public_key: Path) -> None:
        """Let the owner of this key join. A key that is registered already is left as it is."""
        try:
            self._call(["supernode", "register", str(public_key), CONNECTION])
        except ControlFailed as error:
            if KNOWN not in error.what:
                raise

    def nodes(self) -> dict[str, str]:
        """Node id -> ``registered``, ``online`` or ``offline``."""
        answer = self._call(["supernode", "list", CONNECTION])
        return {str(node["node-id"]): str(node["status"]) for node in answer["nodes"]}

    def _call(self, words: Sequence[str]) -> dict[str, Any]:
        """What ``flwr`` answers; its exit code says nothing. ControlFailed if it is no success."""
        self._write_connection()
        try:
            done = subprocess.run(
                [executable("flwr"), *words, "--format", "json"],
                env=flower_environment(self.home),
                capture_output=True,
                text=True,
                timeout=ANSWER_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise self._failed(words, f"no answer in {ANSWER_S:.0f} s") from None
        answer = _last_object(done.stdout)
        if not answer.get("success"):
            said = " ".join((done.stderr or done.stdout).split())
            raise self._failed(words, answer.get("error-message") or said or "no answer")
        return answer

    def _failed(self, words: Sequence[str], reason: str) -> ControlFailed:
        return ControlFailed(f"`flwr {words[0]}` failed: {reason}", where=f"SuperLink {self.address}")

    def _write_connection(self) -> None:
        """Anew each time: a SuperLink that is started again may have another port."""
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "{self.address}"\nroot-certificates = "{self.ca.absolute()}"\n'
        )


def _last_object(text: str) -> dict[str, Any]:
    """The JSON object that the text ends with; empty if there is none."""
    start = text.find("{")
    try:
        found = json.loads(text[start:]) if start >= 0 else {}
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


def wait_healthy(control: Control, stop: StopSignal, tend: Callable[[], None]) -> None:
    """Until the SuperLink answers. Raises Stopped, or RunFailed after ``START_S``."""
    started = time.monotonic()
    while not control.healthy():
        tend()
        stop.check()
        if time.monotonic() - started > START_S:
            raise RunFailed(
                f"no healthy SuperLink at {control.address} within {START_S:.0f} s",
                where=str(control.ca),
                next="its log says why",
            )
        time.sleep(POLL_S)


def enrol(control: Control, pki: Pki, nodes: int, stop: StopSignal, tend: Callable[[], None] = lambda: None) -> None:
    """Once the SuperLink is healthy, register the keys of so many nodes."""
    wait_healthy(control, stop, tend)
    for slot in range(nodes):
        control.register(pki.node_public(slot))
