"""Models built without their weights: parameters on the meta device, everything else real."""

from tuckaway.empty.contexts import init_empty_weights, init_on_device, meta_buffers, rebuild_buffers

__all__ = ["init_empty_weights", "init_on_device", "meta_buffers", "rebuild_buffers"]
