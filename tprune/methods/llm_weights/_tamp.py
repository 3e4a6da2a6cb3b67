"""The paper of the choice of tokens, and of the allocation that goes with it."""

from __future__ import annotations

from tprune.methods.base import Paper

PAPER = Paper(
    title="TAMP: Token-Adaptive Layerwise Pruning in Multimodal Large Language Models",
    venue="arXiv",
    year=2025,
    arxiv="2504.09897",
    code="G-JWLee/TAMP",
    checked="code",
)
