"""What an answer came from: relevance handed back through attention, and what it takes to foretell it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_relevance(maps: Sequence[Tensor], gradients: Sequence[Tensor], start: Tensor) -> Tensor:
    """How relevant every token is to some, by the attention of all layers and its gradients: float32 [B, N].

    With C_l = mean over heads of max(0, ∂y/∂A_l · A_l), it is the mean row of R_L, where R_l = (I + C_l) R_{l-1} and
    R_0 = I (Chefer et al., arXiv 2103.15679, of self-attention). The row goes through the layers from the last to the
    first, so that no product of two maps is ever made.

    Args:
        maps: A_l, [B, H, N, N], from the first layer to the last.
        gradients: of what is to be explained, the same shapes.
        start: bool [B, N], the tokens whose mean row is wanted; at least one.
    """
    row = start / start.sum(1, keepdim=True)
    for attention, gradient in zip(reversed(maps), reversed(gradients), strict=True):
        passed = torch.clamp(attention * gradient, min=0).mean(1)
        row = row + (row.unsqueeze(1) @ passed)[:, 0]
    return row


def foretelling_loss(score: Tensor, wanted: Tensor, there: Tensor) -> Tensor:
    """The cross-entropy of softmax(score) from weights that add up to 1, both over the tokens there; mean over rows.

    Args:
        score: [B, N], with a gradient.
        wanted: [B, N], not negative.
        there: bool [B, N].
    """
    wanted = wanted.detach() * there
    wanted = wanted / wanted.sum(1, keepdim=True).clamp_min(1e-12)
    said = score.masked_fill(~there, -torch.inf).log_softmax(1).masked_fill(~there, 0)
    return -(wanted * said).sum(1).mean()
