"""``client`` and ``server`` are common names: make sure that ours are the ones that would be imported."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fedcil.errors import InputError

HOME = Path(__file__).resolve().parent.parent


def refuse_intruders() -> None:
    """InputError, naming the intruder, unless both packages lie beside ``fedcil``."""
    for package in ("client", "server"):
        spec = find_spec(package)
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found != HOME / package / "__init__.py":
            raise InputError(
                f"the package {package!r} is not fedcil's own",
                where=str(found or "not found"),
                allowed=str(HOME / package),
                next=f"rename or move the other {package!r}, or run from another folder",
            )
