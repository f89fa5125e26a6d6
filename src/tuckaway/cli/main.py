"""Entry point of the ``tuckaway`` command: starts the app, and turns errors into one line and an exit status."""

from __future__ import annotations

import sys

__all__ = ["main"]

_EXTRAS = frozenset({"gguf", "rich", "transformers", "typer"})
"""Packages that only the extra ``demo`` installs."""


def main() -> None:
    """Run the command line with the arguments of this process.

    Raises:
        SystemExit: always; status 0 after success, 1 after an error of tuckaway's, 2 for wrong arguments.
    """
    from tuckaway.errors import TuckawayError

    try:
        from tuckaway.cli.app import app

        app()
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        sys.exit(f"tuckaway: this command needs {error.name}: pip install 'tuckaway[demo]'")
    except TuckawayError as error:
        sys.exit(f"tuckaway: {error}")


if __name__ == "__main__":
    main()
