"""Messages between two processes of this machine: JSON over a socket, tensors through memory that both see.

Each side writes into memory of its own and reads the other's. One speaks, then the other: what was received may be
overwritten as soon as the other side sends tensors again.

Views are made by NumPy, which keeps Python's lock meanwhile: each call of torch lets go of it, and to have it again can
take as long as the whole message.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcil.tensors import Tensors

ALIGNED = 64  # bytes: where each tensor begins is a multiple of it
LENGTH = struct.Struct("Q")  # before each header
Layout = list[tuple[str, str, list[int]]]
"""Name, dtype and shape of tensors that lie one behind the other."""


class Memory:
    """The memory of a file without a name; whoever writes makes it larger where it must be."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._mapped: NDArray[np.uint8] = np.empty(0, np.uint8)

    def tensors(self, layouts: Sequence[Layout], *, copied: bool = False) -> list[dict[str, Tensor]]:
        """Views of it, or of a copy, one layout behind the other."""
        places, size = _places(layouts)
        content = self._first(size).copy() if copied else self._first(size)
        return [
            {
                name: _tensor(content[start:end], kind, shape)
                for (name, kind, shape), (start, end) in zip(layout, here, strict=True)
            }
            for layout, here in zip(layouts, places, strict=True)
        ]

    def close(self) -> None:
        os.close(self._descriptor)

    def _first(self, size: int) -> NDArray[np.uint8]:
        if size > len(self._mapped):
            if size > os.fstat(self._descriptor).st_size:
                os.ftruncate(self._descriptor, 1 << (size - 1).bit_length())
            self._mapped = np.frombuffer(mmap.mmap(self._descriptor, 0), np.uint8)
        return self._mapped[:size]


class Channel:
    """One end: a socket, and file descriptors of the memory that is written and of the memory that is read here."""

    def __init__(self, end: socket.socket, written: int, read: int) -> None:
        self._socket = end
        self._written, self._read = Memory(written), Memory(read)

    def send(self, header: Any, *groups: Tensors) -> None:
        """A header that JSON can tell, and groups of named tensors. OSError if nobody is there any more."""
        layouts = [_layout(group) for group in groups]
        for group, views in zip(groups, self._written.tensors(layouts), strict=True):
            if group:
                torch._foreach_copy_(list(views.values()), list(group.values()))
        text = json.dumps([header, layouts]).encode()
        self._socket.sendall(LENGTH.pack(len(text)) + text)

    def receive(self, wait_s: float | None = None, *, copied: bool = False) -> tuple[Any, list[dict[str, Tensor]]]:
        """The header, and views of the tensors (or copies). TimeoutError if nothing comes within this time; EOFError or
        another OSError if nobody is there any more.
        """
        self._socket.settimeout(wait_s)
        try:
            text = self._some()
        except BlockingIOError:  # what 0 seconds end with
            raise TimeoutError from None
        finally:
            self._socket.settimeout(None)
        length = LENGTH.size + LENGTH.unpack_from(text)[0]
        while len(text) < length:
            text += self._some()
        header, layouts = json.loads(text[LENGTH.size :])
        return header, self._read.tensors(layouts, copied=copied)

    def _some(self) -> bytes:
        text = self._socket.recv(1 << 16)
        if not text:
            raise EOFError("the other side has gone")
        return text

    def hang_up(self) -> None:
        """Nothing can be sent or received from here on, at either end."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for end in (self._socket, self._written, self._read):
            end.close()


def _layout(group: Tensors) -> Layout:
    return [(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in group.items()]


def _tensor(content: NDArray[np.uint8], kind: str, shape: list[int]) -> Tensor:
    if kind == "bfloat16":  # NumPy has none
        return torch.from_numpy(content.view("int16").reshape(shape)).view(torch.bfloat16)
    return torch.from_numpy(content.view(kind).reshape(shape))


def _places(layouts: Sequence[Layout]) -> tuple[list[list[tuple[int, int]]], int]:
    """First byte and the one behind the last of each tensor, and the size of all."""
    places, end = [], 0
    for layout in layouts:
        here = []
        for _, kind, shape in layout:
            start = math.ceil(end / ALIGNED) * ALIGNED
            end = start + math.prod(shape) * getattr(torch, kind).itemsize
            here.append((start, end))
        places.append(here)
    return places, end
