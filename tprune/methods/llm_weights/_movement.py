"""The paper of movement pruning, hard and soft."""

from __future__ import annotations

from tprune.methods.base import Paper

PAPER = Paper(
    title="Movement Pruning: Adaptive Sparsity by Fine-Tuning",
    venue="NeurIPS",
    year=2020,
    arxiv="2005.07683",
    code="huggingface/transformers",
    checked="code",
)
