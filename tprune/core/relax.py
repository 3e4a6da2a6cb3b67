"""Choices that a gradient can pass: hard in the forward pass, smooth in the backward, nothing leaves."""

from __future__ import annotations

import torch
from torch import Tensor


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """`hard` forward, the gradient of `soft` backward; same shapes."""
    return soft + (hard - soft).detach()


def masked_weight(weight: Tensor, score: Tensor, kept: Tensor) -> Tensor:
    """`weight` where it is `kept`, else exactly 0, with a gradient for the `score` of every weight.

    With g the gradient of what is returned, a kept weight gets g, a removed one 0, and every score g · weight, kept or
    not: the mask counts as its score would (movement pruning, arXiv 2005.07683, equation 2). All of one shape.
    """
    return weight * (kept + (score - score.detach()))


def gate(value: Tensor, threshold: Tensor, temperature: float) -> Tensor:
    """1 where `value` exceeds `threshold`, else 0, with the gradient of sigmoid((value - threshold) / temperature)."""
    soft = torch.sigmoid((value - threshold) / temperature)
    return straight_through((soft > 0.5).to(soft.dtype), soft)


def gumbel(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A choice per row of `logits` [..., C], drawn as their softmax has it: one-hot, with the relaxed one's gradient.

    Gumbel noise in float32, of uniform draws kept off 0 and 1; straight through.
    """
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device).clamp(1e-6, 1 - 1e-6)
    soft = ((logits.float() - (-uniform.log()).log()) / temperature).softmax(-1)
    hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1)
    return straight_through(hard, soft)


def mask_attention(rows: Tensor, present: Tensor, epsilon: float, keep_self: bool = False) -> Tensor:
    """Attention as if only the present tokens were keys, with a gradient for those that are absent.

    With w = exp(logit - largest logit) · present, a row becomes (w + ε/N) / (Σ w + ε), as DynamicViT has it. Absent
    tokens as an infinitely negative bias give the same values without the gradient.

    Args:
        rows: softmaxed attention over all tokens, [B, H, N, N].
        present: [B, N], 1 or 0.
        epsilon: ε; keeps a row finite whose keys are all absent.
        keep_self: whether an absent token still attends to itself.
    """
    seen = present[:, None, None, :]
    if keep_self:
        eye = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
        seen = seen + (1 - seen) * eye
    weight = rows / rows.amax(-1, keepdim=True) * seen
    return (weight + epsilon / rows.shape[-1]) / (weight.sum(-1, keepdim=True) + epsilon)
