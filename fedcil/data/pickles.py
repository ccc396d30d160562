"""The official CIFAR archives are pickles. This reader makes arrays, text and numbers of them, no more."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from fedcil.errors import InputError

_RECONSTRUCT = np.empty(0).__reduce__()[0]

# The names that a pickled array refers to, before and after NumPy 2 moved the first of them.
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a file that Python 2 pickled; its keys are text.

    Raises InputError where the file names anything but NumPy arrays, or is no such dictionary.
    """
    try:
        with path.open("rb") as file:
            table = _ArrayUnpickler(file, encoding="latin1").load()
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise _unreadable(path, str(error)) from None
    if not isinstance(table, dict):
        raise _unreadable(path, f"it holds a {type(table).__name__}, not a dictionary")
    return table


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of an array")
        return ALLOWED[module, name]


def _unreadable(path: Path, reason: str) -> InputError:
    return InputError(
        f"cannot be read as a CIFAR file: {reason}",
        where=str(path),
        allowed="the files of the official python archive",
        next="unpack the official archive again",
    )
