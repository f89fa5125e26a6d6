"""Rows of weights to int8 codes and one scale a row, as LLM.int8() does it."""
