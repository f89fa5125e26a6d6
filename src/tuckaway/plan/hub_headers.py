"""What a plan needs of a repository on the Hub: its ``config.json`` and the headers of its weights, and no weights."""

from __future__ import annotations

import json
import logging
from typing import Any

import torch

from tuckaway.checkpoint import Checkpoint
from tuckaway.checkpoint.header import DTYPES
from tuckaway.errors import CheckpointError, CheckpointNotFound

__all__ = ["hub_config", "hub_headers"]

_log = logging.getLogger("tuckaway")


def hub_config(repo_id: str, revision: str | None = None) -> dict[str, Any] | None:
    """Return the ``config.json`` of a repository, from the cache where it is there; ``None``: it has none.

    Raises:
        CheckpointNotFound: no such repository or revision, or it cannot be asked.
        CheckpointError: the file is no JSON object.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        path = hf_hub_download(repo_id, "config.json", revision=revision)
    except LocalEntryNotFoundError as error:
        raise CheckpointNotFound(
            f"{repo_id!r} is no local path, and the Hub's cache has no config.json of that name",
            hint="the Hub was not asked: it is out of reach, or HF_HUB_OFFLINE is set",
        ) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError) as error:
        raise CheckpointNotFound(
            f"{repo_id!r} is neither a local path nor a repository on the Hub that can be read",
            hint="check the name; a private repository needs `hf auth login` or HF_TOKEN",
        ) from error
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the configuration: {error}", where=path) from error
    if not isinstance(content, dict):
        raise CheckpointError("the configuration is no JSON object", where=path)
    return content


def hub_headers(
    repo_id: str, revision: str | None = None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]] | None:
    """Return shape and dtype of every tensor of a repository, from the headers of its safetensors files alone.

    ``None`` where they cannot be had: it has no safetensors, or the Hub is out of reach.
    """
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import (
        HfHubHTTPError,
        NotASafetensorsRepoError,
        OfflineModeIsEnabled,
        SafetensorsParsingError,
    )

    try:
        metadata = get_safetensors_metadata(repo_id, revision=revision)
    except (
        HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError, OfflineModeIsEnabled, OSError
    ) as error:  # fmt: skip
        _log.info("no headers of %s from the Hub: %s", repo_id, error)
        return _cached_headers(repo_id, revision)
    return {
        name: (tuple(info.shape), DTYPES.get(info.dtype, torch.uint8))
        for file in metadata.files_metadata.values()
        for name, info in file.tensors.items()
    }


def _cached_headers(
    repo_id: str, revision: str | None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]] | None:
    """The headers of weights that were downloaded whole, without asking the Hub."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("model.safetensors", "model.safetensors.index.json"):
        path = try_to_load_from_cache(repo_id, name, revision=revision)
        if isinstance(path, str):
            try:
                entries = Checkpoint.open(path).entries
            except CheckpointError as error:  # some shards are not there
                _log.info("no headers of %s in the cache: %s", repo_id, error)
                return None
            return {name: (tuple(entry.shape), entry.dtype) for name, entry in entries.items()}
    return None
