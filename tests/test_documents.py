"""Figures in the documents are those of the files that the benchmark wrote: none is copied wrongly, none forgotten."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from scenarios.benchmarks.bars import FULL

ROOT = Path(__file__).resolve().parent.parent
MACHINES: dict[str, dict[str, Any]] = {
    name: json.loads((ROOT / "docs" / f"bench_{name}.json").read_text()) for name in ("zen4", "zen5", "intel", "avx2")
}
KEPT = ("", "_vs_kept")
STEPS = [
    f"step_{sizes}_{{}}_{images}{kept}"
    for sizes in ("32_128", "8_32")
    for images in ("fresh", "pooled")
    for kept in KEPT
]
SIDES = ("plain", "plain_kept", "flower", "pfl", "fedlab", "blazefl")
ROUNDS = [f"round_{net}_{{}}_vs_{side}" for net in ("lenet", "cnn4", "resnet18") for side in SIDES]
RATIOS = [*STEPS, *(f"boundary_{{}}{kept}" for kept in KEPT), *ROUNDS]
"""Rows of the table in docs/performance.md, by the precision in its place."""
COLUMNS = [
    ("zen4", "fp32"),
    ("zen4", "bf16"),
    ("zen5", "fp32"),
    ("zen5", "bf16"),
    ("intel", "fp32"),
    ("intel", "bf16"),
    ("avx2", "fp32"),
]

SHORT = {  # rows of the README's table
    "MFCL client step, ResNet-18": ["step_32_128_{}_fresh"],
    "... with synthetic images from a pool": ["step_32_128_{}_pooled"],
    "... which has fedcil's setting": ["step_32_128_{}_fresh_vs_kept", "step_32_128_{}_pooled_vs_kept"],
    "generator step at a boundary": ["boundary_{}"],
    "FedAvg round, 4-convolution net": [f"round_cnn4_{{}}_vs_{side}" for side in ("plain", "flower", "pfl")],
    "... LeNet": [f"round_lenet_{{}}_vs_{side}" for side in ("plain", "flower", "pfl")],
    "... ResNet-18, 2 clients": [f"round_resnet18_{{}}_vs_{side}" for side in ("plain", "flower", "pfl")],
}


def rows(document: str, head: str) -> list[list[str]]:
    """Cells of the table below a line that begins so."""
    lines = (ROOT / document).read_text().splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith(f"| {head}"))
    table = lines[start + 2 :]
    end = next((place for place, line in enumerate(table) if not line.startswith("|")), len(table))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[:end]]


def ratio(machine: str, name: str) -> float | None:
    """None where it was not measured."""
    found: float | None = MACHINES[machine].get(name, {}).get("ratio")
    return found


def shown(machine: str, name: str) -> str:
    """As the table has it: in bold where the bar is missed."""
    found = ratio(machine, name)
    if found is None:
        return ""
    text = f"{found:.2f}"
    return f"**{text}**" if found > FULL.most.get(name, float("inf")) else text


def test_the_table_of_ratios_is_what_was_measured() -> None:
    table = rows("docs/performance.md", "CPU seconds of fedcil over those of the other")
    assert len(table) == len(RATIOS) + 1
    for name, cells in zip(RATIOS, table, strict=False):
        expected = [shown(machine, name.format(precision)) for machine, precision in COLUMNS]
        assert cells[2:] == expected, name
    of_the_floor = [f"{100 * (ratio(machine, f'floor_fraction_{p}') or 0.0):.0f} %" for machine, p in COLUMNS]
    assert table[-1][2:] == of_the_floor


@pytest.mark.parametrize("row", SHORT)
def test_the_readme_says_the_same(row: str) -> None:
    (cells,) = [cells for cells in rows("README.md", "what | Zen 4, fp32") if cells[0].startswith(row)]
    for cell, (machine, precision) in zip(cells[1:], COLUMNS[:5], strict=True):
        expected = [shown(machine, name.format(precision)).strip("*") for name in SHORT[row]]
        assert re.findall(r"\d\.\d\d", cell) == expected, (row, machine, precision)


def test_the_engines_of_the_readme_are_those_measured() -> None:
    (cells,) = [cells for cells in rows("README.md", "what | Zen 4, fp32") if cells[0].startswith("engine alone")]
    for cell, machine in ((cells[1], "zen4"), (cells[3], "zen5"), (cells[5], "intel")):
        of_flower = [ratio(machine, f"engine_{name}_1mb_100_vs_flower") or 0.0 for name in ("inline", "ray")]
        assert cell == ", ".join(f"1/{1 / each:.0f}" for each in of_flower)
