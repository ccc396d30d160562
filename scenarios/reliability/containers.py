"""The compose file under faults: build, train, crash and add clients, cut one off, restart the SuperLink, check.

``python -m scenarios.reliability.containers [--quick] [--output result.json]``: needs a Docker engine with compose and
the image (``make image``). About eight minutes; ``--quick`` trains six rounds with one crash.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "fedcil-faults"
CUT_S = 75.0  # longer than Flower takes to notice
LIMIT_S = 900.0
HEALTH = ("https://localhost:8000/health", "/pki/public/ca.pem")
SCENARIO = {"tasks": 3, "clients": 12}  # of scenarios/deploy_digits.toml


def docker(*words: str, check: bool = True, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        ["docker", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    if check and done.returncode:
        sys.exit(f"docker {' '.join(words)} failed:\n{done.stderr.strip()}")
    return done.stdout


@dataclass
class Deployment:
    """One `docker compose up`, and what is known of it from outside."""

    environment: dict[str, str]
    started: float = field(default_factory=time.monotonic)
    notes: list[dict[str, Any]] = field(default_factory=list)

    def compose(self, *words: str, check: bool = True) -> str:
        return docker("compose", "--project-name", PROJECT, *words, check=check, environment=self.environment)

    def note(self, what: str, **more: Any) -> None:
        self.notes.append({"at_s": round(time.monotonic() - self.started, 1), "what": what, **more})
        print(f"{self.notes[-1]['at_s']:6.1f} s  {what}  {more or ''}", flush=True)

    def container(self, service: str, number: int = 1) -> str:
        return f"{PROJECT}-{service}-{number}"

    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl, read where the server app is."""
        read = ["exec", self.container("serverapp"), "sh", "-c", "cat /runs/*/metrics.jsonl"]
        text = docker(*read, check=False)  # empty while there is no run, or no container
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def rounds(self) -> int:
        return sum(line["kind"] == "round" for line in self.lines())

    def wait(self, what: str, look: Callable[[], bool], limit_s: float = 240.0) -> float:
        """Seconds until ``look`` is true; the script fails if it never is."""
        begun = time.monotonic()
        while not look():
            if time.monotonic() - begun > limit_s:
                print(self.compose("logs", "--tail", "30", check=False))
                sys.exit(f"not within {limit_s:.0f} s: {what}")
            time.sleep(2.0)
        return time.monotonic() - begun

    def wait_rounds(self, more: int) -> float:
        goal = self.rounds() + more
        return self.wait(f"{more} more rounds", lambda: self.rounds() >= goal or self.ended())

    def ended(self) -> bool:
        return self.inspect("supervisor", "{{.State.Status}}") == "exited"

    def inspect(self, service: str, form: str, number: int = 1) -> str:
        return docker("inspect", "--format", form, self.container(service, number), check=False).strip()

    def crash(self, service: str, number: int = 1) -> None:
        """Kill its first process from outside: `docker kill` would switch the restart policy off."""
        pid = self.inspect(service, "{{.State.Pid}}", number)
        subprocess.run(["kill", "-KILL", pid], check=True)


def up(deployment: Deployment) -> None:
    deployment.compose("up", "--detach", "--quiet-pull")
    deployment.note("up")
    deployment.wait_rounds(2)
    deployment.note("two rounds are done")


def crash_client(deployment: Deployment) -> None:
    before = deployment.inspect("client", "{{.RestartCount}}")
    deployment.crash("client")
    deployment.wait(
        "the crashed client is back", lambda: deployment.inspect("client", "{{.RestartCount}}") != before, 30
    )
    deployment.note("a client crashed and was restarted", next_round_s=round(deployment.wait_rounds(1), 1))


def add_client(deployment: Deployment) -> None:
    deployment.compose("up", "--detach", "--no-deps", "--no-recreate", "--scale", "client=4", "client")
    deployment.wait("the new client serves", lambda: len(joined(deployment.lines())) >= 4)
    deployment.note("a client was added and serves", clients=len(served(deployment.lines())))


def cut_off(deployment: Deployment) -> None:
    network, container = f"{PROJECT}_clients", deployment.container("client", 2)
    docker("network", "disconnect", network, container)
    deployment.note("a client is cut off")
    time.sleep(CUT_S)
    during = deployment.rounds()
    docker("network", "connect", network, container)
    healed = time.monotonic()
    deployment.wait_rounds(2)
    deployment.note("the network is healed", rounds_before=during, two_rounds_s=round(time.monotonic() - healed, 1))


def restart_superlink(deployment: Deployment) -> None:
    before = deployment.rounds()
    deployment.crash("superlink")
    asked = ("exec", deployment.container("superlink"), "python", "-m", "fedcil.deploy.health", *HEALTH)
    away = deployment.wait("the SuperLink is healthy again", lambda: answers(*asked), 120)
    after = deployment.wait("the next round", lambda: deployment.rounds() > before or deployment.ended())
    deployment.note("the SuperLink crashed", healthy_after_s=round(away, 1), next_round_after_s=round(after, 1))


def answers(*words: str) -> bool:
    return subprocess.run(["docker", *words], capture_output=True, check=False).returncode == 0


ASK = """
import ssl, sys, urllib.error, urllib.request as web
context = ssl.create_default_context(cafile="/pki/public/ca.pem")
request = web.Request(f"https://{sys.argv[1]}:8000/v1/control/list-runs", data=b"")
try:
    print(web.urlopen(request, context=context, timeout=5).status)
except urllib.error.HTTPError as error:
    print(error.code)
except OSError:
    print("unreachable")
"""


def control_answers(deployment: Deployment, service: str, host: str) -> str:
    """What the control interface says to somebody in a container: an HTTP status, or unreachable."""
    return docker("exec", deployment.container(service), "python", "-c", ASK, host, check=False).strip()


def joined(lines: Sequence[dict[str, Any]]) -> set[str]:
    return {event["node"] for line in lines for event in line["cost"].get("nodes", ()) if event["event"] == "joined"}


def served(lines: Sequence[dict[str, Any]]) -> set[int]:
    events = [event for line in lines for event in line["cost"].get("nodes", ()) if event["event"] == "joined"]
    return {client for event in events for client in event["clients"]}


def check(deployment: Deployment, rounds: int) -> dict[str, bool]:
    """What must hold of the finished run and of the containers."""
    lines = deployment.lines()
    places = [(line["task"], line["phase"], line["round"]) for line in lines if line["kind"] == "round"]
    tasks = [line for line in lines if line["kind"] == "task"]
    services = ("superlink", "serverapp", "gate", "client", "supervisor")
    return {
        "the supervisor ended well": deployment.inspect("supervisor", "{{.State.ExitCode}}") == "0",
        "every round is there once": len(places) == len(set(places)) == SCENARIO["tasks"] * rounds,
        "every task was evaluated": len(tasks) == SCENARIO["tasks"],
        "the model learned": all(line["accuracy"][-1] > 0.5 for line in tasks),
        "no round was without a quorum": all(line.get("status", "ok") == "ok" for line in lines),
        "a client cannot reach the control interface": control_answers(deployment, "client", "gate") == "403"
        and control_answers(deployment, "client", "superlink") == "unreachable"
        and control_answers(deployment, "serverapp", "superlink") not in ("403", "unreachable"),
        "all containers are read-only": all(
            deployment.inspect(service, "{{.HostConfig.ReadonlyRootfs}}") == "true" for service in services
        ),
        "no container is root": all(
            deployment.inspect(service, "{{.Config.User}}") == "10001:10001" for service in services
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="six rounds and one crash")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "containers.json")
    options = parser.parse_args()
    rounds = 2 if options.quick else 8
    settings = {"SET": f"training.rounds={rounds}", "CLIENTS_PER_NODE": "3", "MIN_CLIENTS": "9"}
    deployment = Deployment(settings)
    faults = [crash_client] if options.quick else [crash_client, add_client, cut_off, restart_superlink]
    try:
        up(deployment)
        for fault in faults:
            fault(deployment)
        deployment.wait("the run ends", deployment.ended, LIMIT_S)
        deployment.note("the run ended")
        checks = check(deployment, rounds)
    finally:
        deployment.compose("down", "--volumes", "--timeout", "20", check=False)
    deployment.note("down")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"steps": deployment.notes, "checks": checks}, indent=1))
    for name, good in checks.items():
        print(f"{'ok  ' if good else 'FAIL'} {name}")
    print(options.output)
    sys.exit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    main()
