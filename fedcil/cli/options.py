"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. training.rounds=20."),
]
DataRoot = Annotated[Path | None, typer.Option(help="Folder that holds the data sets. [env: FEDCIL_DATA_ROOT]")]
MaxSeconds = Annotated[
    float | None, typer.Option(min=0.0, help="Stop with a checkpoint after this many seconds (exit code 5).")
]
