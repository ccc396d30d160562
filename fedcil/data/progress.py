"""A line on stderr now and then, for decoding that takes minutes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

from fedcil.data.dataset import Bytes

SECONDS_BETWEEN = 2.0


def counted(blocks: Iterable[Bytes], total: int, label: str | None) -> Iterator[Bytes]:
    """``blocks`` as they are; tells under ``label`` how many of ``total`` are decoded (None: silent)."""
    done, said = 0, time.monotonic()
    for block in blocks:
        yield block
        done += len(block)
        if label is not None and time.monotonic() - said > SECONDS_BETWEEN:
            said = time.monotonic()
            print(f"{label}: {done:,} of {total:,} images decoded", file=sys.stderr, flush=True)
