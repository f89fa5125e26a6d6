"""The product by a matrix of int8 codes: LLM.int8(), or weights alone."""
