"""Choices that a gradient can pass: hard in the forward pass, smooth in the backward, nothing leaves."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOWEST, HIGHEST = -0.1, 1.1
"""What a hard-concrete gate is stretched to before it is clipped."""


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


def concrete(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Relaxed Bernoulli draws in (0, 1) with a gradient, sigmoid((log u - log(1 - u) + logit) / temperature).

    Above 1/2 as often as sigmoid(logit) says (arXiv 1611.00712); u is kept off 0 and 1. The shape of `logits`.
    """
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device).clamp(1e-6, 1 - 1e-6)
    return torch.sigmoid((uniform.logit() + logits) / temperature)


def hard_concrete(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Gates in [0, 1], many of them exactly 0 or 1, drawn with a gradient (arXiv 1712.01312); the shape of `logits`.

    sigmoid((log u - log(1 - u) + logit) / temperature), stretched to (-0.1, 1.1) and clipped.
    """
    soft = concrete(logits, temperature, generator)
    return (soft * (HIGHEST - LOWEST) + LOWEST).clamp(0, 1)


def open_probability(logits: Tensor, temperature: float) -> Tensor:
    """How likely each gate of `hard_concrete` is not 0; kept off 0 and 1 by 1e-6."""
    closed = torch.sigmoid(temperature * math.log(-LOWEST / HIGHEST) - logits)
    return 1 - closed.clamp(1e-6, 1 - 1e-6)


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
