"""Live progress with rich on a terminal, plain lines elsewhere, nothing but warnings with --json. Always stderr."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn

from fedcil.metrics import pooled_accuracy

MOST_FAILURES = 5  # of a round that are told one by one


class Display:
    """A watcher that prints a line for every round, task and boundary, and a bar for what is under way."""

    def __init__(self, console: Console, bars: Progress, quiet: bool, label: str) -> None:
        self.console, self.bars, self.quiet = console, bars, quiet
        self.before = f"{label}: " if label else ""
        self.bar: tuple[str, TaskID] | None = None

    def client_done(self, client: int) -> None:
        self._advance("clients", None, f"client {client} answered")

    def boundary_step(self, step: int, steps: int, terms: Mapping[str, float]) -> None:
        del step  # the bar counts by itself
        shown = "  ".join(f"{name} {value:.3g}" for name, value in terms.items())
        self._advance("boundary", steps, shown)

    def recorded(self, line: Mapping[str, Any]) -> None:
        self._drop_bar()
        for warning in line.get("warnings", ()):
            self.warn(warning)
        if not self.quiet:
            for text in (describe(line), *incidents(line)):
                self.console.print(f"{self.before}{text}", markup=False, highlight=False, soft_wrap=True)

    def warn(self, message: Warning | str) -> None:
        self.console.print(f"{self.before}warning: {message}", style="yellow", markup=False, soft_wrap=True)

    def _advance(self, title: str, total: int | None, note: str) -> None:
        if self.quiet or self.bars.disable:
            return
        if self.bar is None or self.bar[0] != title:
            self._drop_bar()
            self.bar = (title, self.bars.add_task(title, total=total, note=""))
        self.bars.advance(self.bar[1])
        if note:
            self.bars.update(self.bar[1], note=note)

    def _drop_bar(self) -> None:
        if self.bar is not None:
            self.bars.remove_task(self.bar[1])
            self.bar = None


def describe(line: Mapping[str, Any]) -> str:
    """One recorded line in words; tasks and rounds count from 1 for people."""
    seconds = f"{line['cost']['seconds']:.1f} s"
    task = f"task {line['task'] + 1}"
    if line["kind"] == "boundary":
        return f"{task} boundary  {seconds}"
    if line["kind"] == "task":
        pooled = pooled_accuracy(line["accuracy"], line["test_images"])
        each = " ".join(f"{100 * value:.0f}" for value in line["accuracy"])
        return f"{task} done      accuracy {100 * pooled:.1f} %  (tasks: {each})"
    parts = [
        f"{task} {line['phase_name']} round {line['round'] + 1}/{line['rounds']}",
        f"{len(line['answered'])} clients",
    ]
    if line["loss"] is not None:
        parts.append(f"loss {line['loss']:.3f}")
    if line["failures"]:
        parts.append(f"{len(line['failures'])} failed")
    if line["status"] != "ok":
        parts.append(line["status"])
    return "  ".join([*parts, seconds])


def incidents(line: Mapping[str, Any]) -> Iterator[str]:
    """Who failed in a round and why; which nodes of a deployment joined, left, were late or were refused."""
    for event in line["cost"].get("nodes", ()):
        clients = ", ".join(map(str, event["clients"])) or "none"
        reason = f": {event['reason']}" if "reason" in event else ""
        yield f"  node {event['node']} {event['event']} (clients {clients}){reason}"
    failures = line.get("failures", ())
    for failure in failures[:MOST_FAILURES]:
        yield f"  client {failure['client']} failed ({failure['stage']}): {failure['reason']}"
    if len(failures) > MOST_FAILURES:
        yield f"  and {len(failures) - MOST_FAILURES} more"


@contextmanager
def display(*, quiet: bool, label: str = "") -> Iterator[Display]:
    """``label``: of one of several runs side by side, which have no bars."""
    console = Console(stderr=True)
    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=quiet or bool(label) or not console.is_terminal,
    )
    shown = Display(console, bars, quiet, label)
    with bars, warnings.catch_warnings():
        # Python's own would say in which line of the program it was.
        warnings.showwarning = lambda message, *_, **__: shown.warn(message)
        yield shown
