"""Randomness by place: a draw depends on what it is for, never on what was drawn before.

``Key(seed).at("task", 3, "round", 7, "client", 12)`` names a place in the run. Two equal places give
equal numbers in every engine, in every process and after every resume. No global generator is touched, but where
somebody else's constructor or layers draw from torch's (``global_draws``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b

import numpy as np
import torch

from fedcil.threads import Turn

Element = str | int


@dataclass(frozen=True, slots=True)
class Key:
    """A seed and a path of names and numbers; each element is hashed to 64 bits with blake2b."""

    seed: int
    path: tuple[int, ...] = ()

    def at(self, *elements: Element) -> Key:
        """The key of a place below this one."""
        return Key(self.seed, self.path + tuple(_hash64(element) for element in elements))

    def numpy(self) -> np.random.Generator:
        """A fresh NumPy generator for this place."""
        return np.random.default_rng(np.random.SeedSequence((self.seed, *self.path)))

    def torch(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh torch generator for this place, on ``device``. On a CPU torch uses 32 bits of its seed: of 300,000
        places some ten pairs draw the same numbers.
        """
        digest = blake2b(repr((self.seed, self.path)).encode(), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


CPU = torch.device("cpu")
_GLOBAL_GENERATOR = Turn()


@contextmanager
def global_draws(key: Key, device: torch.device = CPU) -> Iterator[None]:
    """Code in here draws from torch's global generators, of the CPU and of ``device``, what belongs to this place. One
    thread at a time; the generators are left as they were. RuntimeError if something was drawn while a thread that was
    left behind may have drawn, too.
    """
    seed = key.torch().initial_seed()
    with _GLOBAL_GENERATOR.taken(partial(_rng_states, device), partial(_set_rng_states, device)) as alone:
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        begin = None if alone else rng_state(device)
        yield
        if begin is not None and not torch.equal(begin, rng_state(device)):
            raise RuntimeError("a client that hangs has torch's generator: what another's layers draw is not exact")


def rng_state(device: torch.device) -> torch.Tensor:
    """Of the CPU's global generator and of the device's, one after the other."""
    return torch.cat(_rng_states(device))


def _rng_states(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_rng_states(device: torch.device, states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


def _hash64(element: Element) -> int:
    """Type and value both count: ``at(1)`` and ``at("1")`` are different places.

    TypeError for other types: a NumPy 1 would silently be a place of its own, unlike the same 1 from JSON.
    """
    if type(element) not in (str, int):
        raise TypeError(f"a key is made of str and int, not {type(element).__name__}: {element!r}")
    text = f"{type(element).__name__}:{element}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
