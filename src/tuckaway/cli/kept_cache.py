"""What a model computed of a conversation so far, kept for the next turn: :class:`KeptCache`."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["KeptCache"]

_LAYERS = frozenset(("DynamicLayer", "DynamicSlidingWindowLayer"))
"""Layers of a cache that any number of tokens can be added to. States of recurrent layers take one at a time."""


class KeptCache:
    """Keys and values of the tokens of a conversation, as transformers' ``generate`` takes and returns them.

    They serve the next turn if its tokens begin with those they were computed of. A chat template that writes earlier
    turns otherwise, or a text that is cut into other tokens than it was made of, makes them useless: all is computed.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._kept: dict[str, Any] = {}

    def take(self, tokens: torch.Tensor) -> tuple[dict[str, Any], int]:
        """Return the argument for ``generate`` and how many tokens it spares; nothing is kept until :meth:`keep`.

        Args:
            tokens: of the prompt, int64 ``[1, T]``.
        """
        kept, known = self._kept, self.tokens
        self._kept, self.tokens = {}, []  # generate writes to it: if it fails, nobody knows what is in there
        if kept and len(known) < tokens.shape[-1] and tokens[0, : len(known)].tolist() == known:
            return kept, len(known)
        return {}, 0

    def keep(self, output: Any) -> None:
        """Keep what ``generate(..., return_dict_in_generate=True)`` computed, if tokens can be added to it."""
        name = next((name for name in ("cache", "past_key_values") if output.get(name) is not None), None)
        if name is None:
            return
        cache, tokens = output[name], output.sequences[0].tolist()
        layers = getattr(cache, "layers", None) or [cache]
        if not all(type(layer).__name__ in _LAYERS for layer in layers):
            return
        length = int(cache.get_seq_length())  # the last token was chosen, and not computed with
        if 0 < length <= len(tokens):
            self._kept, self.tokens = {name: cache}, tokens[:length]
