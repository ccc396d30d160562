"""The command line. A command imports what it needs when it runs: ``--help`` loads neither torch nor flwr nor ray."""

from __future__ import annotations

import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from fedcil.cli.commands import app
from fedcil.cli.guard import show_error
from fedcil.cli.streams import put_in_place
from fedcil.errors import FedcilError, InputError
from fedcil.threads import left_behind


def main() -> None:
    """Entry point of ``fedcil``."""
    put_in_place()
    # Python's own would say in which line of the program it was.
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        code = exit_code()
        sys.stdout.flush()
    except FedcilError as error:  # of stdout
        show_error(error, as_json=False)
        code = error.exit_code
    except SystemExit as end:  # likewise
        code = end.code
    if left_behind():
        end_at_once(code)
    sys.exit(code)


def exit_code() -> str | int | None:
    """Of the command that was asked for. A scenario may name a user's own module: this folder is searched too, last."""
    try:
        sys.path.append(str(Path.cwd()))
    except OSError:
        gone = InputError("the working folder is gone", where=os.environ.get("PWD", ""), next="go to one that is there")
        show_error(gone, as_json="--json" in sys.argv)
        return gone.exit_code
    try:
        code: int | None = app(standalone_mode=False)
        return code
    except SystemExit as end:
        return end.code
    except Exception as error:  # typer's own are known by their form: some versions bring click, some do not
        return wrong_usage(error)


def end_at_once(code: str | int | None) -> None:
    """As ``sys.exit`` would, but for threads: one that hangs would work on while what it works with is taken down."""
    try:
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(int(code or 0))


def wrong_usage(error: Any) -> int:
    """Say what is wrong with the words of a command; anything that is not typer's is raised again."""
    match type(error).__name__:
        case "Abort":
            return 130
        case "NoArgsIsHelpError":
            error.show()
            return 2
    if not hasattr(error, "format_message"):
        raise error
    usage = error.ctx.command_path if getattr(error, "ctx", None) else "fedcil"
    said = re.sub(r"( Did you mean [^?]*\?)\1", r"\1", error.format_message())  # typer's hint, and click's
    problem = InputError(said, where=usage, next=f"`{usage} --help` lists the options")
    show_error(problem, as_json="--json" in sys.argv)
    return problem.exit_code


__all__ = ["app", "main"]
