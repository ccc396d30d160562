"""What becomes of work that a GPU cannot capture, with torch.cuda played: there is no GPU where most tests run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from fedcil.capture import WARM_UP, repeatable

CUDA = torch.device("cuda")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(wait_stream=lambda _: None)
    played = {
        "current_stream": lambda _: stream,
        "default_stream": lambda _: None,
        "stream": lambda _: contextlib.nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": lambda *_, **__: contextlib.nullcontext(),
    }
    for name, part in played.items():
        monkeypatch.setattr(torch.cuda, name, part)


def breaking(error: Exception) -> Callable[[], None]:
    """Work that raises in its capture, after the runs that warm up."""
    left = iter(range(WARM_UP))

    def work() -> None:
        if next(left, None) is None:
            raise error

    return work


@pytest.mark.usefixtures("cuda")
def test_work_that_cannot_be_captured_is_done_step_by_step_with_a_warning() -> None:
    work = breaking(RuntimeError("operation not permitted when stream is capturing"))
    with pytest.warns(UserWarning, match="launched kernel by kernel: operation not permitted"):
        assert repeatable(work, CUDA) is work


@pytest.mark.usefixtures("cuda")
def test_out_of_memory_is_not_taken_for_work_that_cannot_be_captured() -> None:
    """Whoever asked can let go of something; going on with one lane less would hide it."""
    with pytest.raises(torch.OutOfMemoryError):
        repeatable(breaking(torch.OutOfMemoryError("CUDA out of memory")), CUDA)


@pytest.mark.usefixtures("cuda")
def test_nor_is_it_where_the_end_of_the_capture_complains_of_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch ends a capture that broke off, too, and that may fail."""

    @contextlib.contextmanager
    def graph(*_: object, **__: object) -> Iterator[None]:
        try:
            yield
        finally:
            raise torch.AcceleratorError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(torch.OutOfMemoryError):
        repeatable(breaking(torch.OutOfMemoryError("CUDA out of memory")), CUDA)
    with pytest.warns(UserWarning, match="launched kernel by kernel: operation failed"):
        repeatable(breaking(RuntimeError("never")), CUDA)


@pytest.mark.usefixtures("cuda")
def test_what_was_captured_is_replayed() -> None:
    work = breaking(RuntimeError("never"))
    assert repeatable(lambda: None, CUDA) is not work


def test_a_cpu_does_the_work_itself() -> None:
    work = breaking(RuntimeError("never"))
    assert repeatable(work, torch.device("cpu")) is work
