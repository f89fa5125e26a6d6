"""Rows of a quantized matrix, by number: only those asked for are read and decoded."""
