"""Rotary position embeddings, for modules of our own."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def frequencies(width: int, base: float) -> Tensor:
    """Radians per position of every pair of a vector's halves, float32 [width / 2], stretched as Llama 3 does.

    base^(-2i / width); waves longer than 8,192 positions are 32 times as long, those below 2,048 as they are, and
    between both it goes over smoothly.
    """
    plain = base ** -(torch.arange(0, width, 2).float() / width)
    turns = 8192 * plain / (2 * math.pi)
    smooth = ((turns - 1) / 3).clamp(0, 1)
    return torch.lerp(plain / 32, plain, smooth)


def rotated(x: Tensor, position: Tensor, frequency: Tensor) -> Tensor:
    """`x` [B, H, N, d] turned by its `position` int64 [B, N]: halves (a, b) become (a cos - b sin, b cos + a sin)."""
    angle = position[:, None, :, None] * frequency.to(x.device)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
