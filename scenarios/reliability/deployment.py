"""Faults of a deployment: its processes killed or paused while `fedcil deploy local` trains."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil

import fedcil
from scenarios.reliability.common import RESUMES, Command, Fault, Outcome, last_line, scratch, sets

SETTINGS = ("training.rounds=3", "stream.tasks=2", "data.classes=4", "training.epochs=3", "server.deadline_s=40")
NODES = 3
PAUSE_S = 30.0
LIMIT_S = 400.0
SERVED = "the run ends by itself; rounds in between have a quorum; the node serves again"


def deploy(output: Path) -> Command:
    words = ("deploy", "local", "deploy_digits", "--nodes", str(NODES), *sets(SETTINGS), "--output", str(output))
    return Command(*words, folder=output)


def run_in(output: Path) -> Path | None:
    return next((path.parent for path in output.glob("*/metrics.jsonl")), None)


def rounds(output: Path) -> int:
    folder = run_in(output)
    return len(fedcil.load(folder).lines) if folder else 0


@cache
def undisturbed() -> list[dict[str, Any]]:
    """The metrics of the same scenario on the inline engine."""
    output = scratch("reference")
    command = Command("run", "deploy_digits", *sets(SETTINGS), "--output", str(output), folder=output)
    assert command.wait() == 0, command.said()
    folder = run_in(output)
    assert folder is not None
    return fedcil.load(folder).results


def process(command: Command, *words: str) -> psutil.Process | None:
    """The one that was called with all these words."""
    for child in command.family():
        try:
            called = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if all(word in called for word in words):
            return child
    return None


def strike(
    seed: int, output: Path, words: tuple[str, ...], blow: Callable[[psutil.Process], None]
) -> tuple[Command, float]:
    """Start, let some rounds pass, and hit; returns the command and the seconds until the next line of metrics."""
    command, chance = deploy(output), random.Random(seed)
    goal = chance.randint(1, 5)
    while command.running() and rounds(output) < goal:
        time.sleep(0.2)
    time.sleep(chance.uniform(0.0, 6.0))
    while command.running() and (target := process(command, *words)) is None:
        time.sleep(0.05)
    before, struck = rounds(output), time.monotonic()
    if command.running() and target is not None:
        blow(target)
    while command.running() and rounds(output) == before:
        time.sleep(0.2)
    return command, time.monotonic() - struck


def kill(target: psutil.Process) -> None:
    target.kill()


def pause(target: psutil.Process) -> None:
    target.send_signal(signal.SIGSTOP)
    time.sleep(PAUSE_S)
    target.send_signal(signal.SIGCONT)


def judge(command: Command, output: Path, recovery: float, *, same: bool) -> Outcome:
    family = command.family()
    code = command.wait(LIMIT_S)
    folder = run_in(output)
    if code != 0 or folder is None:
        return Outcome(False, f"exit code {code}: {last_line(command.said())}")
    left = [child.pid for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    if left:
        return Outcome(False, f"processes left: {left}")
    found = fedcil.load(folder).results
    identical = found == undisturbed()
    if same and not identical:
        return Outcome(False, "ended with OTHER metrics", recovery)
    short = [line for line in found if line.get("status", "ok") != "ok"]
    what = "identical metrics" if identical else f"{len(short)} rounds without a quorum"
    return Outcome(not short and len(found) == len(undisturbed()), f"ended with {what}", recovery)


def trial(
    words: tuple[str, ...], blow: Callable[[psutil.Process], None], *, same: bool
) -> Callable[[int, Path], Outcome]:
    def struck(seed: int, workdir: Path) -> Outcome:
        command, recovery = strike(seed, workdir, words, blow)
        return judge(command, workdir, recovery, same=same)

    return struck


SUPERLINK, SERVER_APP = ("flower-superlink",), ("flwr-serverapp",)
NODE, CLIENT_APP = ("flower-supernode", "partition-id=1"), ("flwr-clientapp",)

FAULTS = (
    Fault("deploy_superlink_killed", RESUMES, trial(SUPERLINK, kill, same=True), 3),
    Fault("deploy_server_app_killed", RESUMES, trial(SERVER_APP, kill, same=True), 3),
    Fault("deploy_superlink_paused", RESUMES, trial(SUPERLINK, pause, same=True), 2),
    Fault("deploy_node_killed", SERVED, trial(NODE, kill, same=False), 3),
    Fault("deploy_node_paused", SERVED, trial(NODE, pause, same=False), 2),
    Fault("deploy_client_app_killed", SERVED, trial(CLIENT_APP, kill, same=False), 2),
)
