"""Work of fixed shapes that is done many times: on a GPU its kernels are captured once as a graph and replayed.

A training step of a small batch is hundreds of kernels of a few microseconds. Launched from Python one by one, they
leave a large GPU idle for two thirds of the time (docs/gpu.md).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 3  # runs before a capture: libraries choose kernels and allocate in the first ones


def repeatable(work: Callable[[], object], device: torch.device, pool: Any = None) -> Callable[[], object]:
    """``work`` itself on a CPU; on a GPU a replay of its kernels, on whatever stream is current then.

    ``work`` reads and writes tensors that stay where they are; it draws nothing and never waits for the device. On a
    GPU it is run a few times here: what it changed, the caller puts back. ``pool`` (``torch.cuda.graph_pool_handle``):
    memory for graphs that never run at the same time. Where the capture fails, ``work`` itself, with a warning;
    torch.OutOfMemoryError is raised.
    """
    if device.type != "cuda":
        return work
    current = torch.cuda.current_stream(device)
    # The default stream cannot be captured; libraries keep their scratch memory per stream, so lanes stay on theirs.
    stream = torch.cuda.Stream(device) if current == torch.cuda.default_stream(device) else current
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            if (shortage := out_of_memory(error)) is not None:
                raise shortage from None  # the caller has something to let go of
            warnings.warn(f"a step cannot be captured and is launched kernel by kernel: {error}", stacklevel=2)
            return work
    current.wait_stream(stream)
    return graph.replay


def out_of_memory(error: BaseException | None) -> torch.OutOfMemoryError | None:
    """The lack of memory that ``error`` is, or was raised about: a capture that broke off complains of that instead."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error
