"""Freed memory stays with the process: what goes back to the system is faulted in again, page by page, a step later.

A FedAvg round of a 4-convolution net takes up to 40,000 such faults, a quarter of its time (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import os
import sys

KEPT_BYTES = 1 << 30  # blocks below come from the heap, of which so much may lie free at its end
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Ask glibc's malloc for it, for this whole process. False where there is no glibc, or somebody has set it up by
    the environment (``MALLOC_...``, ``GLIBC_TUNABLES``): then everything stays as it is.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(each, KEPT_BYTES) == 1 for each in (TRIM_THRESHOLD, MMAP_THRESHOLD))
