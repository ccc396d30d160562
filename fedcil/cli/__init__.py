"""The command line. A command imports what it needs when it runs: ``--help`` loads neither torch nor flwr nor ray."""

from __future__ import annotations

from fedcil.cli.commands import app


def main() -> None:
    """Entry point of ``fedcil``."""
    app()


__all__ = ["app", "main"]
