"""Attention from the leading bits of queries and keys, and from all bits where those say too little (SpAtten)."""

from __future__ import annotations

import torch
from torch import Tensor


def leading_bits(x: Tensor, bits: int, dropped: int) -> Tensor:
    """`x` [B, H, N, d] as symmetric linear integers of `bits`, the `dropped` lowest set to zero: float32.

    The scale is the largest absolute value of every head, of all its tokens.
    """
    most = 2 ** (bits - 1) - 1
    scale = x.float().abs().amax((2, 3), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / most
    step = 2**dropped
    return (x.float() / scale).round().div_(step).floor_().mul_(step) * scale


def sharpened(rough: Tensor, fine: Tensor, threshold: float) -> Tensor:
    """Rows of `rough` attention [B, H, R, T], but of `fine` where no entry of a row reaches `threshold`."""
    return torch.where(rough.amax(3, keepdim=True) < threshold, fine, rough)


def largest_of_rows(attention: Tensor, fraction: float) -> Tensor:
    """Every row [..., T] with its largest entries alone, ceil(fraction · T) of them; nothing is normalised again.

    Of equals the first stay.
    """
    length = attention.shape[-1]
    count = -int(-length * fraction // 1)
    if count >= length:
        return attention
    index = attention.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(attention).scatter(-1, index, attention.gather(-1, index))
