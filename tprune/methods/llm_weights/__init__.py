"""Weights, heads, channels and blocks of language models: one file per paper."""
