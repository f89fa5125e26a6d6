"""The folder that a result grows in, beside its destination, and what is known of it: :class:`Staging`.

A shard that is finished is recorded with its checksum in ``conversion.json``. A run that finds such a folder, made of
the same source for the same result, verifies the shards against their checksums and goes on behind them. When all is
there the folder is renamed to the destination: one call, before which there is nothing under that name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuckaway import files
from tuckaway.convert.shard import checksum_of
from tuckaway.errors import CheckpointError, StoreBusy, StoreError

__all__ = ["MANIFEST", "Record", "Staging", "fingerprint_of"]

_log = logging.getLogger("tuckaway")

MANIFEST = "conversion.json"
"""In the result too: what it was made from, and the checksums of its shards."""


@dataclass(frozen=True)
class Record:
    """A finished shard: its bytes, and a checksum of all its tensors' bytes."""

    nbytes: int
    checksum: str


def fingerprint_of(*parts: object) -> str:
    """Make one text of everything that decides the result's bytes."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


class Staging:
    """The folder of one conversion, held alone; a context manager that gives it up.

    On the way out after an error, finished shards stay for the next run.

    Args:
        destination: folder that the result is to have; it must not exist, or be empty.
        fingerprint: of the source and the config.
        description: what ``conversion.json`` says of the source.

    Raises:
        StoreBusy: another process makes the same destination.
        StoreError: the destination exists and is something else, or the folder cannot be made.
    """

    def __init__(self, destination: Path, fingerprint: str, description: dict[str, Any]) -> None:
        self.destination = destination
        self.fingerprint = fingerprint
        self.description = description
        self.folder = destination.with_name(f".{destination.name}.converting")
        self.records: dict[str, Record] = {}
        self.complete = False
        self._lock = files.FolderLock(destination.with_name(f".{destination.name}.lock"))

    def __enter__(self) -> Staging:
        files.make_folder(self.destination.parent)
        if not self._lock.acquire():
            raise StoreBusy(
                "another process converts to this folder",
                where=self.destination,
                hint="wait for it to end, or choose another folder",
            )
        try:
            self._begin()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if not self.complete and not self.records:
                self._clear(())
                files.remove_folder(self.folder)
        finally:
            self._lock.release()

    def _begin(self) -> None:
        if self._listing(self.destination):
            found = _read(self.destination)
            if found is None or found.get("fingerprint") != self.fingerprint:
                raise StoreError(
                    "the destination is not empty",
                    where=self.destination,
                    hint="choose another folder, or remove it",
                )
            self.records, self.complete = (
                _records(found),
                True,
            )  # killed behind the rename, or simply asked again
            self._clear(())
            files.remove_folder(self.folder)
            return
        files.make_folder(self.folder)
        found = _read(self.folder)
        if found is not None and found.get("fingerprint") == self.fingerprint:
            self.records = {
                name: record for name, record in _records(found).items() if self._is_good(name, record)
            }
        elif found is not None:
            _log.warning("what lies in %s was made from something else, and is begun anew", self.folder)
        self._clear(self.records)
        self._write()

    def _is_good(self, name: str, record: Record) -> bool:
        try:
            good = checksum_of(self.folder / name) == (record.nbytes, record.checksum)
        except CheckpointError as error:
            _log.warning("%s is made again: %s", name, error.what)
            return False
        if not good:
            _log.warning("%s is made again: its bytes differ from their checksum", name)
        return good

    def _clear(self, keep: Any) -> None:
        """Remove all but the named files: temps of killed runs, shards that were never recorded."""
        for name in self._listing(self.folder):
            if name not in keep:
                files.remove(self.folder / name)

    @staticmethod
    def _listing(folder: Path) -> list[str]:
        if not folder.exists():
            return []
        if not folder.is_dir():
            raise StoreError("this is a file", where=folder, hint="name a folder")
        return sorted(os.listdir(folder))

    def add(self, name: str, record: Record) -> None:
        """Note a finished shard; from here on it is not made again."""
        self.records[name] = record
        self._write()

    def finish(self) -> None:
        """Let the whole destination appear."""
        files.sync_folder(self.folder)
        files.replace(self.folder, self.destination)
        self.complete = True
        files.sync_folder(self.destination.parent)

    def _write(self) -> None:
        content = {
            "version": 1,
            "fingerprint": self.fingerprint,
            **self.description,
            "shards": {name: vars(record) for name, record in sorted(self.records.items())},
        }
        files.write_atomically(self.folder / MANIFEST, json.dumps(content, indent=1).encode() + b"\n")


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        _log.warning("%s cannot be read: %s", folder / MANIFEST, error)
        return None
    return content if isinstance(content, dict) else None


def _records(content: dict[str, Any]) -> dict[str, Record]:
    """Read the shards of a manifest; what makes no sense is as good as not there."""
    shards = content.get("shards")
    found = {}
    for name, value in (shards if isinstance(shards, dict) else {}).items():
        if (
            os.path.basename(name) == name
            and isinstance(value, dict)
            and isinstance(value.get("nbytes"), int)
            and isinstance(value.get("checksum"), str)
        ):
            found[name] = Record(value["nbytes"], value["checksum"])
    return found
