"""Turn a checkpoint into a quantized one, shard by shard, without building its model: :func:`quantize_checkpoint`.

The result is what :func:`~tuckaway.load_and_quantize_model` followed by :func:`~tuckaway.save_model` would write. It
takes the memory of the stream's ring, whatever the size, and can be killed at any moment: finished shards are kept.
"""

from tuckaway.convert.convert import Conversion, quantize_checkpoint

__all__ = ["Conversion", "quantize_checkpoint"]
