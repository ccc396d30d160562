"""Whose problem it is when a client's work breaks: its own, or more than that."""

from __future__ import annotations

import torch

from fedcil.errors import FedcilError, RunFailed, Stopped, asked_to_end, described
from fedcil.messages import MOST_CHARACTERS, UNEXPECTED, Failure, Job


class ClientProblem(FedcilError):
    """A client that cannot do its job for a known reason; ``where`` is the stage."""


class GpuBroken(RunFailed):
    """No work on it can succeed in this process any more."""


def broken() -> bool:
    """Whether the GPU does nothing more here after an error: after some it goes on."""
    try:
        torch.cuda.synchronize()
    except (RuntimeError, AssertionError):  # the second: a torch without CUDA
        return True
    return False


def failure(job: Job, error: BaseException) -> Failure:
    """What a client's problem is to the server. Raises what is more than that: an end that was asked for, a signal's,
    and GpuBroken after an assertion on the device or an address that is not there.
    """
    if isinstance(error, Stopped) or asked_to_end(error):
        raise error
    if isinstance(error, torch.AcceleratorError) and broken():
        raise GpuBroken(
            f"a client's work broke the GPU for this process: {described(error)}",
            next="`fedcil resume RUN` goes on in a new one; CUDA_LAUNCH_BLOCKING=1 in its environment shows the line",
        ) from error
    if isinstance(error, ClientProblem):
        return Failure(job.client, error.where, error.what[:MOST_CHARACTERS])
    return Failure(job.client, UNEXPECTED, described(error)[:MOST_CHARACTERS])
