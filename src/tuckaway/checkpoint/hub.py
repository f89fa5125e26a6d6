"""Fetch a checkpoint of the Hugging Face Hub into its cache, only the files that are needed: :func:`fetch`.

:func:`survey` looks at a repository without downloading its weights, for those who take them shard by shard.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tuckaway.checkpoint.index import INDEX_SUFFIX, PICKLE_SUFFIXES, SAFETENSORS, shard_names
from tuckaway.errors import CheckpointError, CheckpointNotFound, TuckawayError, UnsafeFormatError

__all__ = ["Repository", "fetch", "is_repo_id", "push", "survey"]

_log = logging.getLogger("tuckaway")

_SAFE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "adapter_model.safetensors",
)
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_REPO_ID = re.compile(rf"(?:{_PART}/)?{_PART}")


def is_repo_id(text: str) -> bool:
    """Say whether ``text`` can be the id of a repository: ``"org/name"``, or ``"name"`` as the oldest ones have it.

    >>> is_repo_id("gpt2"), is_repo_id("org/name"), is_repo_id("./gpt2"), is_repo_id("model.safetensors")
    (True, True, False, False)
    """
    suffixes = (SAFETENSORS, INDEX_SUFFIX, *PICKLE_SUFFIXES)
    sane = (
        len(text) <= 96 and "--" not in text and ".." not in text and not text.endswith((".git", *suffixes))
    )
    return sane and _REPO_ID.fullmatch(text) is not None


def fetch(repo_id: str, revision: str | None = None, *, allow_pickle: bool = True) -> Path:
    """Return the local path of a repository's weight file or index, downloading what the cache lacks.

    safetensors come before pickles. huggingface_hub's environment is obeyed: ``HF_HOME``, ``HF_HUB_OFFLINE``,
    ``HF_TOKEN`` and the rest. ``config.json`` comes along where there is one.

    Args:
        repo_id: id of a model repository.
        revision: branch, tag or commit; ``None``: the main branch.
        allow_pickle: take pickles where there are no safetensors.

    Raises:
        CheckpointNotFound: no such repository, revision or weights, or, while offline, not in the cache.
        UnsafeFormatError: there are pickles only, and ``allow_pickle`` is False.
        UnsafePathError: the index names a path out of its folder.
        CheckpointError: the download failed.
    """
    hub = _Hub(repo_id)
    for name in _SAFE + _PICKLED:
        path = hub.get(name, revision)
        if path is None:
            continue
        if name in _PICKLED and not allow_pickle:
            raise UnsafeFormatError(
                f"the repository {repo_id!r} has pickles only, and pickles are refused (allow_pickle=False)",
                hint="use a safetensors version of this checkpoint",
            )
        commit = path.parent.name  # of the cache's snapshots/<commit>/: a branch may move while we download
        hub.get("config.json", commit)
        if name.endswith(INDEX_SUFFIX):
            hub.get_shards(path, commit)
        return path
    if hub.cache_only:
        raise CheckpointNotFound(
            f"{repo_id!r}{_at(revision)} is no local path, and the Hub's cache has no weights of that name",
            hint="the Hub was not asked: it is out of reach, or HF_HUB_OFFLINE is set",
        )
    raise CheckpointNotFound(
        f"the repository {repo_id!r}{_at(revision)} has no weights of Hugging Face's names",
        hint="such as " + _SAFE[0],
    )


@dataclass(frozen=True)
class Repository:
    """A repository at one commit.

    Args:
        repo_id: its id.
        commit: the commit.
        names: all of its files.
    """

    repo_id: str
    commit: str
    names: tuple[str, ...]

    def download(self, name: str) -> Path:
        """Return the path of a file in the cache, once it is there.

        Raises:
            CheckpointNotFound: the repository has no such file, or cannot be reached.
            CheckpointError: the download failed.
        """
        from huggingface_hub import hf_hub_download

        with _typed(self.repo_id, self.commit):
            return Path(hf_hub_download(self.repo_id, name, revision=self.commit))

    def header(self, name: str) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
        """Ask for the header of a safetensors file alone: dtype, shape, begin and end behind the header, by name.

        Raises:
            CheckpointError: it cannot be had.
        """
        from huggingface_hub import HfApi

        with _typed(self.repo_id, self.commit):
            found = HfApi().parse_safetensors_file_metadata(self.repo_id, name, revision=self.commit)
        return {key: (t.dtype, tuple(t.shape), *t.data_offsets) for key, t in found.tensors.items()}


def survey(repo_id: str, revision: str | None = None) -> Repository | None:
    """List a repository's files at one commit; ``None``: the Hub cannot be reached, or is not to be asked.

    Raises:
        CheckpointNotFound: no such repository or revision, or no access to it.
    """
    from huggingface_hub import HfApi

    try:
        with _typed(repo_id, revision):
            found = HfApi().model_info(repo_id, revision=revision)
    except CheckpointNotFound as error:
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        if isinstance(error.__cause__, HfHubHTTPError | HFValidationError):
            raise  # the Hub answered
        return None
    except CheckpointError as error:
        _log.info("%s", error)
        return None
    return Repository(repo_id, str(found.sha), tuple(file.rfilename for file in found.siblings or ()))


def push(folder: Path, repo_id: str) -> str:
    """Upload a folder's files to a repository, which is made (private) where it does not exist; return its address.

    Raises:
        CheckpointError: the Hub refused, or cannot be reached.
    """
    from huggingface_hub import HfApi

    with _typed(repo_id, None):
        address = HfApi().create_repo(repo_id, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Quantized by tuckaway")
    return str(address)


class _Hub:
    """One repository; after the first failure to reach the Hub only its cache is asked."""

    def __init__(self, repo_id: str) -> None:
        self.repo_id = repo_id
        self.cache_only = False

    def get(self, name: str, revision: str | None) -> Path | None:
        """Return a file's path in the cache; ``None``: the repository, or the cache while offline, has none such."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        with _typed(self.repo_id, revision):
            try:
                return Path(
                    hf_hub_download(self.repo_id, name, revision=revision, local_files_only=self.cache_only)
                )
            except (
                LocalEntryNotFoundError
            ) as error:  # each try to reach the Hub can take ten seconds: one is enough
                self.cache_only = True
                _log.debug("no %s of %s in the cache: %s", name, self.repo_id, error)
            except EntryNotFoundError:
                _log.debug("%s has no %s", self.repo_id, name)
            return None

    def get_shards(self, index: Path, commit: str) -> None:
        """Download the shards of an index that the cache lacks."""
        from huggingface_hub import snapshot_download

        names = shard_names(index)
        missing = [name for name in names if not (index.parent / name).exists()]
        if missing and not self.cache_only:
            patterns = [re.sub(r"([*?[])", r"[\1]", name) for name in missing]
            with _typed(self.repo_id, commit):
                snapshot_download(self.repo_id, revision=commit, allow_patterns=patterns)
            missing = [name for name in names if not (index.parent / name).exists()]
        if missing:
            raise CheckpointNotFound(
                f"{len(missing)} of {len(names)} shards of {self.repo_id!r} are not in the Hub's cache: "
                + ", ".join(missing[:3]),
                where=index,
                hint="download them while online",
            )


@contextmanager
def _typed(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into our errors; below it lies another HTTP library in each major version."""
    from huggingface_hub import errors

    what = f"{repo_id!r}{_at(revision)}"
    try:
        yield
    except TuckawayError:
        raise
    except errors.GatedRepoError as error:
        raise CheckpointNotFound(
            f"access to {what} must be asked for on the Hub",
            hint="log in with `hf auth login`, or set HF_TOKEN",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointNotFound(f"the repository {repo_id!r} has no revision {revision!r}") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise CheckpointNotFound(
            f"{what} is neither a local path nor a repository on the Hub",
            hint="check the name; a private repository needs `hf auth login` or HF_TOKEN",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointNotFound(
            f"the Hub cannot be reached, and its cache lacks files of {what}",
            hint="download them while online",
        ) from error
    except (
        Exception
    ) as error:  # the HTTP library's own kinds, which are no part of huggingface_hub's interface
        raise CheckpointError(f"cannot download {what}: {type(error).__name__}: {error}") from error


def _at(revision: str | None) -> str:
    return f" at {revision!r}" if revision else ""
