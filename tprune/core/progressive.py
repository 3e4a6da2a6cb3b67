"""Attention from the leading bits of queries and keys, and from all bits where those say too little (SpAtten)."""

from __future__ import annotations

import torch
from torch import Tensor


def leading_bits(x: Tensor, bits: int, dropped: int, real: Tensor | None = None) -> Tensor:
    """`x` [B, H, N, d] as symmetric linear integers of `bits`, the `dropped` lowest set to zero: float32.

    The scale is the largest absolute value of every head, of all its tokens that are `real`, bool [B, H or 1, N].
    """
    most = 2 ** (bits - 1) - 1
    sizes = x.float().abs().amax(3, keepdim=True)
    if real is not None:
        sizes = sizes.masked_fill(~real.unsqueeze(3), 0)
    scale = sizes.amax(2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / most
    step = 2**dropped
    return (x.float() / scale).round().div_(step).floor_().mul_(step) * scale


def sharpened(rough: Tensor, fine: Tensor, threshold: float) -> Tensor:
    """Rows of `rough` attention [B, H, R, T], but of `fine` where no entry of a row reaches `threshold`."""
    return torch.where(rough.amax(3, keepdim=True) < threshold, fine, rough)


def largest_of_rows(attention: Tensor, fraction: float, seen: Tensor | None = None) -> Tensor:
    """Rows of [B, H, R, T] with their largest entries alone, ceil(fraction · T) of them; nothing is normalised again.

    Of equals the first stay. Where only some keys are `seen`, bool [B, H or 1, T], these are T.
    """
    length = attention.shape[-1]
    count = -int(-length * fraction // 1)
    if count >= length:
        return attention
    index = attention.argsort(dim=-1, descending=True, stable=True)[..., :count]
    largest = attention.gather(-1, index)
    if seen is not None:
        counts = (seen.sum(-1).double() * fraction).ceil()[..., None, None]
        largest = largest.masked_fill(torch.arange(count, device=counts.device) >= counts, 0)
    return torch.zeros_like(attention).scatter(-1, index, largest)
