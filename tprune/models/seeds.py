"""Seeds of random draws that depend on what is looked at alone."""

from __future__ import annotations

import torch
from torch import Tensor


def content_seeds(pixels: Tensor, seed: int) -> Tensor:
    """A seed per image from its own content, int64 [B] on the CPU: the same image draws the same in any batch."""
    flat = pixels.detach().float().contiguous().flatten(1).view(torch.int32).to(torch.int64)
    weight = torch.arange(flat.shape[1], device=flat.device) * 2654435761 % 1000003 + 1
    return ((flat * weight).sum(1) + 7919 * seed).abs().cpu() % (2**62)
