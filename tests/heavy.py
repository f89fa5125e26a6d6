"""How much the tests that only a great number makes convincing do: little by default, nearly all in CI's heavy step.

``TUCKAWAY_HEAVY=1`` is that step; ``TUCKAWAY_HEAVY=all`` adds what only many models of one kind would add.
"""

from __future__ import annotations

import os

HEAVY = os.environ.get("TUCKAWAY_HEAVY") in ("1", "all")
ALL = os.environ.get("TUCKAWAY_HEAVY") == "all"


def count(light: int, heavy: int) -> int:
    """Return ``heavy`` under ``TUCKAWAY_HEAVY=1``, or else ``light``, which takes a second or two."""
    return heavy if HEAVY else light
