"""Models of timm and torchvision, the small ones: they come with the extra ``zoo``."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

TIMM = {
    "vit_tiny_patch16_224": {"img_size": 64},
    "deit_tiny_patch16_224": {"img_size": 64},
    "convnext_atto": {},
    "resnet10t": {},
    "mobilenetv3_small_050": {},
    "regnetx_002": {},
    "ghostnet_050": {},
    "pvt_v2_b0": {},
    "edgenext_xx_small": {},
    "efficientvit_b0": {},
    "mobileone_s0": {},
    "repvgg_a0": {},
    "poolformerv2_s12": {},
}
TORCHVISION = (
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "squeezenet1_1",
    "shufflenet_v2_x0_5",
    "mnasnet0_5",
    "efficientnet_b0",
    "regnet_y_400mf",
    "densenet121",
)
NAMES = [*(f"timm/{name}" for name in TIMM), *(f"torchvision/{name}" for name in TORCHVISION)]


def missing() -> str:
    """Why they cannot be built here; empty if they can."""
    lacking = [name for name in ("timm", "torchvision") if find_spec(name) is None]
    return f"{' and '.join(lacking)} not installed (pip install 'tuckaway[zoo]')" if lacking else ""


_declared: list[Any] = []


def import_torchvision() -> Any:
    """Import torchvision, whichever build of torch is there; transformers imports it too, and must come later."""
    try:
        import torchvision
    except RuntimeError:
        # its compiled operators need the CUDA build of torch; its models do not need them, only their declaration
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        import torchvision
    return torchvision


def build(name: str) -> nn.Module:
    """Make one of :data:`NAMES`."""
    torchvision = import_torchvision()
    package, _, own = name.partition("/")
    if package == "torchvision":
        return torchvision.models.get_model(own).eval()  # type: ignore[no-any-return]
    import timm

    return timm.create_model(own, **TIMM[own]).eval()  # type: ignore[no-any-return]


def picture() -> tuple[torch.Tensor, ...]:
    return (torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(5)),)
