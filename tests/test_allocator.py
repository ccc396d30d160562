"""Freed memory that stays: seen by counting page faults of a process that takes and frees memory again and again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from fedcil.allocator import keep_freed_memory
kept = keep_freed_memory() if "keep" in sys.argv else None
def once():
    a, b = bytearray(30 << 20), bytearray(90 << 20)  # larger than what glibc keeps by itself
once()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    once()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*words: str, **environment: str) -> tuple[str, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True, env=clean | environment
    )
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is a library of Linux")
def test_freed_memory_is_not_faulted_in_again() -> None:
    kept, count = faults("keep")
    assert kept == "True"
    assert 10 * count < faults()[1]


def test_whoever_has_set_up_malloc_keeps_that() -> None:
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
