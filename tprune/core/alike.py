"""Dropping what resembles much else."""

from __future__ import annotations

import torch
from torch import Tensor

from tprune.core.score import cosine_normalise, redundancy


def redundancy_of_evens(
    metric: Tensor, real: Tensor, threshold: float, gamma: float
) -> tuple[Tensor, Tensor]:
    """How redundant the tokens at even places are beside those at odd places (SAINT).

    Args:
        metric: [B, N, d], unit rows.
        real: bool [B, N].
        threshold, gamma: see `redundancy`.

    Returns:
        The score [B, ceil(N / 2)], float32, -inf where the even token is not real; and how many odd ones are like it,
        int64, 0 there.
    """
    worth, alike = redundancy(
        metric[:, ::2] @ metric[:, 1::2].transpose(1, 2), real[:, 1::2], threshold, gamma
    )
    even = real[:, ::2]
    return worth.masked_fill(~even, -torch.inf), alike.masked_fill(~even, 0)


def drop_central(features: Tensor, rounds: Tensor, stays: Tensor) -> Tensor:
    """In every round the tokens most similar to all that are left, in sum, leave (SAINT inside a vision tower).

    Inherently sequential over the rounds; one matrix-vector product each. Of equals the lower index leaves.

    Args:
        features: [B, N, D], compared by cosine; a token counts itself.
        rounds: int64 [B, R], how many leave in each.
        stays: bool [B, N], what is there at first.

    Returns:
        bool [B, N], what is left.
    """
    unit = cosine_normalise(features, eps=1e-12)
    similarity = unit @ unit.transpose(1, 2)  # [B, N, N]
    rank = torch.arange(features.shape[1], device=features.device)
    for count in rounds.to(features.device).unbind(1):
        score = (similarity @ stays.to(similarity.dtype).unsqueeze(2)).squeeze(2)
        order = score.masked_fill(~stays, -torch.inf).argsort(dim=1, descending=True, stable=True)
        stays = stays & ~torch.zeros_like(stays).scatter(1, order, rank < count.unsqueeze(1))
    return stays
