"""What the surgeon's two ways of cutting share: their paper, and the inverse curvature of a matrix."""

from __future__ import annotations

from torch import Tensor

from tprune.core.kronecker import live_inverse
from tprune.methods.base import Paper
from tprune.methods.weight_view import LinearView

PAPER = Paper(
    title="The LLM Surgeon",
    venue="ICLR",
    year=2024,
    arxiv="2312.17244",
    code="Qualcomm-AI-research/llm-surgeon",
    checked="code",
)


def inverses(linear: LinearView, damp_outputs: float, damp_inputs: float) -> tuple[Tensor, Tensor]:
    """G⁻¹ [out, out] and A⁻¹ [in, in], zero where all weights of a row or column, or the moments, are."""
    there = linear.weight != 0
    rows = there.any(1) & (linear.output_gram.diagonal() > 0)
    columns = there.any(0) & (linear.gram.diagonal() > 0)
    return live_inverse(linear.output_gram, rows, damp_outputs), live_inverse(
        linear.gram, columns, damp_inputs
    )
