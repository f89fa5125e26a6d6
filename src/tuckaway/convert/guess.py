"""A model made up of a checkpoint's names and shapes, where its own class is not at hand: :func:`guess_model`.

It has no forward. It is there so that the rules for real models (which weights are quantized, and why not) decide here
too: a matrix is a linear layer, turned round where its bias says so, a table of tokens is an embedding by its name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import nn

from tuckaway.checkpoint import Checkpoint
from tuckaway.formats import Shape, registered_formats
from tuckaway.load.scaled import scales_of

__all__ = ["guess_model"]

_EMBEDDING = re.compile(
    r"(^|_)(embed|embeds|embedding|embeddings|emb|wte|wpe|wtt|shared|relative_attention_bias)(_|$)"
)
_HEADS = ("lm_head", "embed_out")
_TOP_HEADS = ("output", "head", "score", "classifier", "qa_outputs")
"""Names of output heads that mean something else below the top: an attention has an ``output`` too."""
_RECURRENT = re.compile(r"weight_[ih][hr]_l\d+(_reverse)?")
_LONGEST_KERNEL = 16  # of a 1-D convolution: a stack of experts is longer in every dimension

_Tensors = dict[str, tuple[Shape, torch.dtype]]


class Conv1D(nn.Module):
    """Stands for transformers' ``Conv1D``, whose weight is ``[in, out]``; known by its name."""


class GuessedRouter(nn.Module):
    """Stands for what chooses experts: a matrix that is too small and too sensitive to quantize."""


class GuessedModel(nn.Module):
    """The root."""

    _keys_to_ignore_on_load_unexpected = None

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "_guessed_head", None)  # a plain name could be one of the checkpoint's

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output head, or ``None``."""
        head: nn.Module | None = self.__dict__["_guessed_head"]
        return head


def guess_model(checkpoint: Checkpoint) -> nn.Module:
    """Make an empty model whose parameters and buffers are the checkpoint's tensors, under their names.

    Tensors that are quantized already have the shape they have when decoded; an 8-bit float is taken for the format of
    a 16-bit one.

    Example:
        >>> import tempfile, safetensors.torch
        >>> folder = tempfile.mkdtemp()
        >>> tensors = {"a.weight": torch.ones(4, 8), "a.bias": torch.ones(8), "norm.weight": torch.ones(8)}
        >>> safetensors.torch.save_file(tensors, f"{folder}/model.safetensors")
        >>> guess_model(Checkpoint.open(folder)).a
        Conv1D()
    """
    holders: dict[str, _Tensors] = defaultdict(dict)
    for name, what in _logical(checkpoint).items():
        path, _, own = name.rpartition(".")
        holders[path][own] = what
    turned = _turned_round(holders)
    root = GuessedModel()
    modules: dict[str, nn.Module] = {"": root}
    for path in sorted(holders, key=_in_order):
        module = root if path == "" else _module_of(path, holders, turned)
        if path:
            _put(modules, path, module)
        for own, (shape, dtype) in holders[path].items():
            tensor = torch.empty(shape, dtype=dtype, device="meta")
            if dtype.is_floating_point:
                module._parameters[own] = nn.Parameter(tensor, requires_grad=False)
            else:
                module._buffers[own] = tensor
    head = _head_of(holders)
    object.__setattr__(root, "_guessed_head", None if head is None else modules[head])
    return root


def _logical(checkpoint: Checkpoint) -> dict[str, tuple[Shape, torch.dtype]]:
    """Return shape and dtype of every tensor as a model sees it."""
    entries, found, parts = checkpoint.entries, {}, set[str]()
    for name, entry in entries.items():
        shape, dtype = entry.shape, entry.dtype
        if not dtype.is_floating_point or dtype.itemsize == 1:
            for format in registered_formats().values():
                quantized = format.find(name, entries, checkpoint.read)
                if quantized is not None:
                    parts |= quantized.consumed - {name}
                    shape, dtype = quantized.layout.shape, quantized.layout.dtype
                    break
        if dtype.is_floating_point and dtype.itemsize == 1:
            dtype = torch.bfloat16
            parts |= scales_of(name, entries)[1]
        found[name] = (tuple(shape), dtype)
    return {name: what for name, what in found.items() if name not in parts}


def _in_order(path: str) -> list[tuple[int, int, str]]:
    """Sort by the dotted path, numbers as numbers: a list's modules in their order."""
    return [(0, int(p), "") if p.isdecimal() and len(p) < 10 else (1, 0, p) for p in path.split(".")]


def _put(modules: dict[str, nn.Module], path: str, module: nn.Module) -> None:
    """Hang a module into the tree, with whatever is missing above it."""
    inner = modules.get(path)
    if inner is not None:
        module._modules.update(inner._modules)
    modules[path] = module
    parent, _, own = path.rpartition(".")
    if parent not in modules:
        _put(modules, parent, nn.Module())
    modules[parent]._modules[own] = module


def _module_of(path: str, holders: Mapping[str, _Tensors], turned: set[str]) -> nn.Module:
    tensors, own = holders[path], path.rpartition(".")[2]
    shape = tensors.get("weight", ((), None))[0]
    if any(_RECURRENT.fullmatch(name) for name in tensors):
        return _bare(nn.RNNBase)
    if len(shape) == 2:
        if "bias" not in tensors and _EMBEDDING.search(own):
            return _bare(nn.Embedding, num_embeddings=shape[0], embedding_dim=shape[1], max_norm=None)
        if _is_router(path, holders):
            return GuessedRouter()
        if path in turned:
            return Conv1D()
        return _bare(nn.Linear, in_features=shape[1], out_features=shape[0], bias=None)
    if len(shape) >= 3 and (len(shape) > 3 or shape[2] < _LONGEST_KERNEL):
        kind = {3: nn.Conv1d, 4: nn.Conv2d}.get(len(shape), nn.Conv3d)
        return _bare(kind, groups=2 if shape[1] == 1 else 1, transposed=False)
    return nn.Module()


def _bare(kind: type[nn.Module], **attributes: object) -> nn.Module:
    """Make a module of a class without its constructor, which would allocate, and initialize, and take its time."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, value in attributes.items():
        if value is not None:
            object.__setattr__(module, name, value)
        elif name == "bias":
            module._parameters["bias"] = None
        else:
            object.__setattr__(module, name, None)
    return module


def _is_router(path: str, holders: Mapping[str, _Tensors]) -> bool:
    parent, _, own = path.rpartition(".")
    first = f"{parent}.experts.0."  # a Mixtral has w1 to w3 below it, most others up_proj and down_proj
    return own in ("gate", "router") and any(f"{first}{name}" in holders for name in ("w1", "up_proj"))


def _turned_round(holders: Mapping[str, _Tensors]) -> set[str]:
    """Find the modules whose weight is ``[in, out]``: the bias, as long as the outputs, says so.

    A square weight says nothing; it is turned where others of its name are (``attn.c_proj``, by ``mlp.c_proj``).
    """
    turned, square, kinds = set[str](), set[str](), dict[str, bool]()
    for path, tensors in holders.items():
        shape, bias = tensors.get("weight", ((), None))[0], tensors.get("bias", ((), None))[0]
        if len(shape) != 2 or len(bias) != 1:
            continue
        own = path.rpartition(".")[2]
        if shape[0] == shape[1]:
            square.add(path)
        elif bias[0] == shape[1]:
            turned.add(path)
            kinds.setdefault(own, True)
        elif bias[0] == shape[0]:
            kinds[own] = False
    return turned | {path for path in square if kinds.get(path.rpartition(".")[2], False)}


def _head_of(holders: Mapping[str, _Tensors]) -> str | None:
    matrices = [path for path, tensors in holders.items() if len(tensors.get("weight", ((),))[0]) == 2]
    named = [path for path in matrices if path.rpartition(".")[2] in _HEADS]
    named += [path for path in matrices if path in _TOP_HEADS]
    return min(named, key=lambda path: path.count("."), default=None)
