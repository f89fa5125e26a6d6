"""Packed nf4 or fp4 codes and their scales back to weights."""
