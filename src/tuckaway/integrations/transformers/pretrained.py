"""``AutoModel....from_pretrained`` through tuckaway's own loader: :func:`from_pretrained`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tuckaway.checkpoint import Checkpoint
from tuckaway.config import QuantizationConfig, as_dtype
from tuckaway.empty import init_empty_weights
from tuckaway.errors import ConfigError
from tuckaway.load.job import DeviceMap, run

__all__ = ["from_pretrained"]

_HUB = ("cache_dir", "force_download", "local_files_only", "token")


def from_pretrained(
    pretrained_model_name_or_path: str | Path,
    *,
    quantization_config: Any = None,
    device_map: DeviceMap | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
    offload_buffers: bool = False,
    dtype: torch.dtype | str | None = "auto",
    config: Any = None,
    model_class: Any = None,
    revision: str | None = None,
    subfolder: str = "",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    experts_implementation: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    no_split_module_classes: Sequence[str] | None = None,
    main_device: int | str | torch.device | None = None,
    skip_keys: str | Sequence[str] | None = None,
    use_safetensors: bool | None = None,
    strict: bool = False,
    progress: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Load a transformers model, quantized on the way and placed over GPU, RAM and disk.

    Takes what ``AutoModelForCausalLM.from_pretrained`` takes, and does what that cannot: quantized weights on
    ``"disk"``, pages of whole blocks instead of a copy for every tensor, bounded memory while loading, bitsandbytes'
    4-bit and 8-bit checkpoints without bitsandbytes, and a named error before anything is loaded that does not fit.

    Args:
        pretrained_model_name_or_path: a folder, or a Hub id.
        quantization_config: a :class:`~tuckaway.QuantizationConfig`, a ``TuckawayConfig``, a ``BitsAndBytesConfig`` or
            a format's name. ``None``: what the checkpoint's ``config.json`` says; nothing is quantized if it says
            nothing.
        device_map: as of :func:`~tuckaway.load_and_quantize_model`, like the next three.
        max_memory: bytes a device may take.
        offload_folder: folder for what is placed on disk.
        offload_buffers: page buffers too.
        dtype: dtype of what is not quantized, unless the quantization config names one. ``"auto"``: what
            ``config.json`` says.
        config: a model configuration, instead of the folder's own.
        model_class: a model's class or an ``AutoModel...`` class. ``None``: what ``config.json`` names under
            ``architectures``.
        revision: branch, tag or commit of a Hub id.
        subfolder: folder inside a local one.
        trust_remote_code: let a repository's own Python code build the model.
        attn_implementation: as transformers has it: ``"sdpa"``, ``"eager"``, ...
        experts_implementation: as transformers has it: ``"grouped_mm"``, ``"batched_mm"``, ``"eager"``.
        key_mapping: regular expressions of names in the checkpoint to what replaces them.
        no_split_module_classes: class names of modules that stay whole; ``None``: those that the model names itself.
        main_device: device that executes.
        skip_keys: keyword arguments that are not moved between devices.
        use_safetensors: True refuses pickles.
        strict: refuse a checkpoint with tensors that the model has no place for, instead of a warning.
        progress: show a bar; ``None``: when standard error is a terminal.
        **kwargs: options of the Hub (``token``, ``cache_dir``, ``force_download``, ``local_files_only``), and
            attributes of the model's configuration to change.

    Returns:
        The model, in evaluation mode, with its generation config, ``hf_device_map`` and ``quantization_report``.

    Raises:
        ConfigError: a config that makes no sense, an option that nothing takes, no class for the model.
        TuckawayError: as :func:`~tuckaway.load_and_quantize_model`.

    Example:
        >>> import tempfile, tuckaway
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> folder = tempfile.mkdtemp()
        >>> small = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2)
        >>> LlamaForCausalLM(small).save_pretrained(folder)
        >>> model = tuckaway.from_pretrained(
        ...     folder, quantization_config="nf4", device_map={"": "disk"}, offload_folder=tempfile.mkdtemp()
        ... )
        >>> model(torch.ones(1, 4, dtype=torch.int64)).logits.shape
        torch.Size([1, 4, 64])
    """
    name = Path(pretrained_model_name_or_path, subfolder) if subfolder else pretrained_model_name_or_path
    hub = {key: kwargs.pop(key) for key in _HUB if key in kwargs}
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code, **hub}
    config = _model_config(name, config, source, kwargs)
    quantization, given_here = _quantization(config, quantization_config)
    wanted = _dtype(dtype, config, quantization)
    # checked before the network is asked for weights
    model = _build(config, model_class, wanted, source, attn_implementation, experts_implementation)
    if hub and not Path(name).exists():
        name = _download(str(name), revision, hub)
    checkpoint = Checkpoint.open(name, revision=revision, allow_pickle=use_safetensors is not True)
    return _load(
        model,
        checkpoint,
        quantization,
        key_mapping,
        name,
        source,
        dtype=wanted,
        device_map=device_map,
        no_split_module_classes=no_split_module_classes,
        max_memory=max_memory,
        offload_folder=offload_folder,
        main_device=main_device,
        offload_buffers=offload_buffers,
        skip_keys=skip_keys,
        strict=strict,
        progress=progress,
        own_config=given_here,
    )


def _load(
    model: Any,
    checkpoint: Checkpoint,
    quantization: QuantizationConfig | None,
    key_mapping: Mapping[str, str] | None,
    name: str | Path,
    source: Mapping[str, Any],
    **options: Any,
) -> Any:
    from tuckaway.integrations.transformers.conversions import converted
    from tuckaway.integrations.transformers.quantizer import TuckawayQuantizer, forget_conversions

    checkpoint, rules = converted(checkpoint, model, key_mapping)
    if options["device_map"] == "disk":
        options["device_map"] = {"": "disk"}
    final = quantization
    if final is not None and final.dtype is None:
        final = final.replace(dtype=options["dtype"])
    model = run(model, checkpoint, final, **options)
    model._weight_conversions = rules
    if quantization is not None:
        TuckawayQuantizer.adopt(model, quantization)
    else:
        forget_conversions(model)
    if model.can_generate():
        from transformers import GenerationConfig

        with contextlib.suppress(
            OSError
        ):  # a folder without one: the model made its own of its configuration
            model.generation_config = GenerationConfig.from_pretrained(
                name, **{key: value for key, value in source.items() if key != "trust_remote_code"}
            )
    model.config.name_or_path = str(name)
    return model.eval()


def _model_config(
    name: str | Path, config: Any, source: Mapping[str, Any], changes: Mapping[str, Any]
) -> Any:
    from transformers import AutoConfig

    if config is not None and not isinstance(config, str | Path):
        return config
    found, unused = AutoConfig.from_pretrained(
        name if config is None else config, return_unused_kwargs=True, **source, **changes
    )
    left = [key for key in unused if key in changes]
    if left:
        raise ConfigError(
            f"from_pretrained has no option {left[0]!r}, and the model's configuration no such attribute",
            hint="see help(tuckaway.from_pretrained)",
        )
    return found


def _quantization(config: Any, given: Any) -> tuple[QuantizationConfig | None, bool]:
    """Return what to quantize to, and whether the user wrote it."""
    if given is not None:
        return QuantizationConfig.of(given), isinstance(given, QuantizationConfig) or _is_ours(given)
    saved = getattr(config, "quantization_config", None)
    if saved is None:
        saved = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    return (None, False) if saved is None else (QuantizationConfig.of(saved), False)


def _is_ours(given: Any) -> bool:
    return getattr(given, "quant_method", None) == "tuckaway"


def _dtype(
    dtype: torch.dtype | str | None, config: Any, quantization: QuantizationConfig | None
) -> torch.dtype | None:
    if quantization is not None and quantization.dtype is not None:
        return as_dtype(quantization.dtype, "dtype")
    if dtype is None or dtype == "auto":
        saved = getattr(config, "dtype", None)
        if saved is None:
            saved = getattr(config.get_text_config(), "dtype", None)
        return as_dtype(saved, "dtype") if saved is not None else None
    return as_dtype(dtype, "dtype")


def _build(
    config: Any,
    model_class: Any,
    dtype: torch.dtype | None,
    source: Mapping[str, Any],
    attention: str | None,
    experts: str | None,
) -> Any:
    import transformers

    if isinstance(model_class, str):
        model_class = getattr(transformers, model_class)
    options: dict[str, Any] = {"dtype": dtype} if dtype is not None else {}
    if attention is not None:
        options["attn_implementation"] = attention
    if experts is not None:
        options["experts_implementation"] = experts
    remote = getattr(config, "auto_map", None) or {}
    if model_class is None:
        named = next(iter(getattr(config, "architectures", None) or ()), "")
        automatic = next((auto for auto, code in remote.items() if str(code).endswith(f".{named}")), None)
        model_class = getattr(transformers, automatic or named or "AutoModel", None)
    if model_class is None:
        raise ConfigError(
            f"transformers {transformers.__version__} has no class {named!r}, which the configuration names",
            hint="pass model_class=AutoModelForCausalLM or another class that builds the model",
        )
    with init_empty_weights():
        if hasattr(model_class, "from_config"):
            model = model_class.from_config(config, trust_remote_code=source["trust_remote_code"], **options)
        else:
            model = model_class._from_config(config, **options)
    model.tie_weights()
    return model


def _download(repository: str, revision: str | None, hub: Mapping[str, Any]) -> str:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.bin"]
    options: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": ["*/*"], **hub}
    return str(snapshot_download(repository, revision=revision, **options))
