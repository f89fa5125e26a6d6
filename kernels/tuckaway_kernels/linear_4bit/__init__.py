"""The product by a matrix of nf4 or fp4 codes."""
