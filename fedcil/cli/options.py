"""Options that several commands have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. training.rounds=20."),
]
Output = Annotated[Path, typer.Option(help="Where run folders are made.")]
RUNS = Path("runs")
"""The default of ``Output``."""
Figures = Annotated[bool, typer.Option(help="Draw the figures of the run folder.")]
DataRoot = Annotated[Path | None, typer.Option(help="Folder that holds the data sets. [env: FEDCIL_DATA_ROOT]")]


def _a_number(value: float | None) -> float | None:
    if value is not None and math.isnan(value):
        raise typer.BadParameter("nan is no number of seconds")
    return value


MaxSeconds = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1e9,
        callback=_a_number,
        help="Stop with a checkpoint after this many seconds (exit code 5).",
    ),
]
