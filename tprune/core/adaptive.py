"""Choosing the tokens that stand for a sequence of images and text (TAMP, arXiv 2504.09897)."""

from __future__ import annotations

import torch
from torch import Tensor

CHECKED = 16
"""Picks between two looks at whether all samples have enough."""


def likenesses(cosine: Tensor, visual: Tensor | None = None) -> Tensor:
    """How alike the tokens of a sample are to each other.

    Args:
        cosine: [B, L, L], of every token with every.
        visual: bool [B, L], which of them show images and are not text; None where all are of a kind.

    Returns:
        float32 [B, 3]: the means of the positive cosines of two different tokens of images, and of text, 0 without any,
        and of all cosines of one with the other; NaN where a sample has no token of a kind. [B, 1] without `visual`.
    """
    if visual is None:
        return _positive(cosine, cosine.new_ones(cosine.shape[:2], dtype=torch.bool)).unsqueeze(1)
    mixed = visual.unsqueeze(2) & ~visual.unsqueeze(1)
    between = (cosine * mixed).sum((1, 2)) / mixed.sum((1, 2))
    return torch.stack([_positive(cosine, visual), _positive(cosine, ~visual), between], 1)


def _positive(cosine: Tensor, there: Tensor) -> Tensor:
    """The mean of the positive cosines [B, L, L] of two different tokens that are `there`, bool [B, L]: [B]."""
    pairs = ((cosine > 0) & there.unsqueeze(2) & there.unsqueeze(1)).triu(1)
    mean = (cosine * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)
    return mean.masked_fill(~there.any(1), torch.nan)


def messages(cosine: Tensor, importance: Tensor, near: int) -> tuple[Tensor, Tensor]:
    """What a token is worth with its neighbours: p_i + Σ_j exp(cos_ij - 1) p_j over the `near` most alike.

    Args:
        cosine: [B, L, L].
        importance: p, [B, L].
        near: neighbours of a token; of so many and one more most alike tokens the first counts as itself.

    Returns:
        float32 [B, L], and the neighbours int64 [B, L, near].
    """
    found = cosine.topk(min(near + 1, cosine.shape[2]), dim=2).indices[..., 1:]
    weight = (cosine.gather(2, found) - 1).exp()
    heard = importance.unsqueeze(1).expand_as(cosine).gather(2, found)
    return importance + (weight * heard).sum(2), found


def representative(cosine: Tensor, importance: Tensor, bound: Tensor, near: int, decay: float) -> Tensor:
    """Tokens picked by worth until their distribution is near that of all, bool [B, L].

    The pick i, each time the worthiest left, takes exp(-decay (1 - cos_ij)) times its own worth, if that is positive,
    from its neighbours j; picking ends when the squared maximum mean discrepancy to all tokens is below `bound`, with
    the kernel exp(-‖y_i - y_j‖² / 2) of unit vectors y. Sequential over the picks, for all samples together.

    Args:
        cosine: [B, L, L].
        importance: [B, L].
        bound: [B].
        near: neighbours of a token.
        decay: see above.
    """
    worth, neighbours = messages(cosine, importance, near)
    square = cosine.diagonal(dim1=1, dim2=2)
    kernel = (cosine - (square.unsqueeze(1) + square.unsqueeze(2)) / 2).exp()
    column = kernel.mean(1)  # [B, L], the mean of the kernel between a token and all
    everything = column.mean(1)
    rows = torch.arange(len(cosine), device=cosine.device)
    picked = torch.zeros_like(importance, dtype=torch.bool)
    cross, within = torch.zeros_like(bound), torch.zeros_like(bound)
    going = torch.ones_like(bound, dtype=torch.bool)
    for count in range(1, cosine.shape[1] + 1):
        pick = worth.masked_fill(picked, -torch.inf).argmax(1)
        own, beside = worth[rows, pick].clamp_min(0), neighbours[rows, pick]
        shared = (decay * (cosine[rows, pick].gather(1, beside) - 1)).exp() * own.unsqueeze(1)
        worth = worth.scatter_add(1, beside, -shared)
        row = kernel[rows, pick]
        within = within + 2 * (row * picked).sum(1) + row[rows, pick]
        cross = cross + column[rows, pick]
        picked[rows, pick] |= going
        going = going & ~(everything + within / count**2 - 2 * cross / count < bound)
        if count % CHECKED == 0 and not bool(going.any()):
            break
    return picked
