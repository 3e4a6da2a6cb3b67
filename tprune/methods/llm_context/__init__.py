"""Tokens and caches of long prompts: one file per paper."""
