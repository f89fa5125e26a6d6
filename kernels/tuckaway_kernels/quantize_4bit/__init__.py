"""Weights to packed nf4 or fp4 codes and their scales."""
