"""tuckaway inside transformers: a quantization config, its quantizer, and a loader without their limits."""
