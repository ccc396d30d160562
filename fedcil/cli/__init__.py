"""The command line. A command imports what it needs when it runs: ``--help`` loads neither torch nor flwr nor ray."""

from __future__ import annotations

import sys
from pathlib import Path

from fedcil.cli.commands import app


def main() -> None:
    """Entry point of ``fedcil``. A scenario may name a user's own module, so this folder is searched too, last."""
    sys.path.append(str(Path.cwd()))
    app()


__all__ = ["app", "main"]
