"""Freed memory stays with the process: what goes back to the system is faulted in again, page by page, a step later.

A FedAvg round of a 4-convolution net takes 42,000 such faults, a third of its time (docs/performance-notes.md).
"""

from __future__ import annotations

import ctypes
import os
import sys

KEPT_BYTES = 1 << 30  # blocks below come from the heap, of which so much may lie free at its end
MOST_BEFORE = 32 << 20  # the largest of such blocks that glibc allowed before 2.35
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Ask glibc's malloc for it, for this whole process. False where there is no glibc, or somebody has set it up by
    the environment (``MALLOC_...``, ``GLIBC_TUNABLES``): then everything stays as it is.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    from_heap = mallopt(MMAP_THRESHOLD, KEPT_BYTES) or mallopt(MMAP_THRESHOLD, MOST_BEFORE)  # 0: refused
    return bool(from_heap and mallopt(TRIM_THRESHOLD, KEPT_BYTES))
