"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


BUSY = 0.1  # share of all cores beyond which wall seconds are not comparable


def used_by_others() -> float:
    """Share of all cores that is in use while this process sleeps for a second."""
    share: float = psutil.cpu_percent(interval=1.0) / 100
    return share


def describe(peers: Mapping[str, object]) -> dict[str, Any]:
    """``peers``: what is installed for each."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    facts = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in facts.items()}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": f"{named.get('model name', platform.processor())}, family {named.get('cpu family', '?')}",
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "flags": [flag for flag in FLAGS if flag in named.get("flags", "").split()],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "libc": " ".join(platform.libc_ver()),
        "huge_pages": first_line(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in ("torch", "torchvision", "flwr", "ray", "numpy")},
        "peers": dict(peers),
    }


def first_line(path: Path) -> str | None:
    return path.read_text().strip() if path.exists() else None


def commit() -> str | None:
    """Of this checkout, with ``-dirty`` where files differ from it; None without git."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def version_of(name: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
