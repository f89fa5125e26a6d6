"""How much the tests that only a great number makes convincing do: little by default, all of it in CI's heavy step."""

from __future__ import annotations

import os

HEAVY = os.environ.get("TUCKAWAY_HEAVY") == "1"


def count(light: int, heavy: int) -> int:
    """Return ``heavy`` under ``TUCKAWAY_HEAVY=1``, or else ``light``, which takes a second or two."""
    return heavy if HEAVY else light
