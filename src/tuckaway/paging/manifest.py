"""What an offload folder says about itself, and whose it is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tuckaway import files
from tuckaway.errors import StoreCorrupt, StoreStale
from tuckaway.paging.page import PageLayout

__all__ = ["ANOTHER", "MANIFEST", "REMOVE", "VERSION", "fingerprint_of", "read_manifest", "refuse_foreign"]

VERSION = 2
MANIFEST = "manifest.json"

ANOTHER = "wait for it to end or choose another offload_folder"
REMOVE = "remove the offload folder and load the model again"


def fingerprint_of(layouts: Iterable[PageLayout], identity: str) -> str:
    """Hash of everything that decides which byte lies where and what it means."""
    digest = hashlib.sha256(f"tuckaway {VERSION} {identity or os.urandom(16).hex()}\n".encode())
    for layout in layouts:
        for item in layout.items:
            digest.update(f"{item.key} {item.shape} {item.dtype} {item.offset}\n".encode())
        digest.update(b"\n")
    return ("" if identity else "once-") + digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a folder's manifest; None if there is none.

    Raises:
        StoreCorrupt: it cannot be read.
        StoreStale: it is somebody else's file.
    """
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreCorrupt(f"unreadable manifest: {error}", where=folder / MANIFEST, hint=REMOVE) from error
    if not isinstance(content, dict) or content.get("about") != "tuckaway pages":
        raise StoreStale("a manifest that is none of tuckaway's", where=folder / MANIFEST, hint=EMPTY)
    return content


EMPTY = "give an empty offload_folder, or remove this one if nothing needs it"


def refuse_foreign(folder: Path, manifest: dict[str, Any] | None) -> None:
    """Leave alone what belongs to somebody else."""
    # weights that were in no file are never used again, so their pages are nobody's loss
    if manifest is not None and not str(manifest.get("fingerprint", "")).startswith("once-"):
        raise StoreStale(
            "the offload folder holds another model, or this one in another format", where=folder, hint=EMPTY
        )
    names = files.names_in(folder)
    if "index.json" in names or any(name.endswith(".dat") for name in names):
        raise StoreStale(
            "the offload folder holds weights that accelerate offloaded", where=folder, hint=EMPTY
        )
