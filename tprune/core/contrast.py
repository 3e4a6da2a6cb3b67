"""Embeddings of texts, and how well each query finds its own text among others."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

POOLINGS = ("weighted_mean", "mean", "last")


def pooled(hidden: Tensor, begin: Tensor, end: Tensor, how: str) -> Tensor:
    """One vector of every row's tokens begin … end - 1: float32 [B, D].

    Args:
        hidden: [B, L, D].
        begin, end: int64 [B]; a row without tokens gives zeros.
        how: "mean"; "weighted_mean", whose weights are 1, 2, 3 … from `begin` on (SGPT, arXiv 2202.08904); or "last".
    """
    place = torch.arange(hidden.shape[1], device=hidden.device)
    begin, end = begin.to(hidden.device).unsqueeze(1), end.to(hidden.device).unsqueeze(1)
    within = (place >= begin) & (place < end)
    if how == "last":
        weight = (within & (place == end - 1)).float()
    else:
        weight = within * (place - begin + 1 if how == "weighted_mean" else torch.ones_like(place)).float()
    weight = weight / weight.sum(1, keepdim=True).clamp_min(1e-9)
    return torch.einsum("bl,bld->bd", weight, hidden.float())


def contrastive_loss(query: Tensor, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Cross entropy of each query's own positive among the positives and negatives of all (InfoNCE): a scalar.

    Args:
        query, positive, negative: [B, D].
        scale: of the cosines that are logits.
    """
    logits = scale * normalize(query, dim=1) @ normalize(torch.cat([positive, negative]), dim=1).T
    return cross_entropy(logits, torch.arange(len(query), device=query.device))
