"""The command line: `qkernels`, or `python -m qkernels.cli`."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console script."""
    try:
        from qkernels.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich"):
            raise
        print(
            f"qkernels: the command line needs {error.name}: pip install 'qkernels[cli]'",
            file=sys.stderr,
        )
        sys.exit(1)
    app()
