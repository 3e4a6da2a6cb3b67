"""Neurons of experts that leave, merged into those of experts that stay."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tprune.core.cosine import between

STRIP = 1024
"""Neurons compared with all others at once."""


def recombine(
    kept: Tensor, worth: Tensor, leaving: Iterable[Tensor], worth_leaving: Tensor, least: float, by_part: bool
) -> Tensor:
    """Every neuron of an expert that leaves joins the one most like it, of all experts that stay.

    A neuron becomes the mean of itself and those that joined it, weighted by the worth of their experts; one that is
    like no other by more than `least` is dropped (arXiv 2509.10377, steps 2 and 3 as the abstract has them).

    Args:
        kept: float32 [K, M, 3 D], the neurons of K experts: a row of gate, a row of up, a column of down.
        worth: [K], of the experts that stay.
        leaving: float32 [M, 3 D] each, the neurons of the others.
        worth_leaving: theirs.
        least: cosine from which on two neurons are merged.
        by_part: compare gate, up and down each at length one, so that a neuron's scale does not matter.

    Returns:
        float32 [K, M, 3 D].
    """
    flat = kept.flatten(0, 1)
    own = worth.to(flat).clamp_min(torch.finfo(flat.dtype).tiny).repeat_interleave(kept.shape[1])
    total, weight = flat * own.unsqueeze(1), own.clone()
    compared = _unit_parts(flat) if by_part else flat
    for neurons, share in zip(leaving, worth_leaving.tolist(), strict=True):
        for part in neurons.split(STRIP):
            likeness = between((_unit_parts(part) if by_part else part)[None], compared[None])[0]
            best, home = likeness.max(1)
            joins = best >= least
            total.index_add_(0, home[joins], part[joins] * share)
            weight.index_add_(0, home[joins], torch.full_like(best[joins], share))
    joined = weight > own
    return torch.where(joined.unsqueeze(1), total / weight.unsqueeze(1), flat).view_as(kept)


def _unit_parts(neurons: Tensor) -> Tensor:
    """Neurons [N, 3 D] with their three parts at length one."""
    parts = neurons.unflatten(1, (3, -1))
    return (parts / parts.norm(dim=2, keepdim=True).clamp_min(1e-12)).flatten(1)
