"""Nested (double) quantization: the scales of 4-bit weights to 8 bits, and back."""
