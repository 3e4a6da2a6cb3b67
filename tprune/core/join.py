"""Reductions of some rows of a batch each, as one of all rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tprune.core.reduction import Reduction


def join(parts: Sequence[tuple[Sequence[int], Reduction]], batch: int) -> Reduction:
    """`parts` are (rows, reduction of these rows), drops and merges; every row of the batch is in one of them.

    Shorter rows get fillers in front, and nowhere to flow to at the end.
    """
    if len(parts) == 1:
        return parts[0][1]
    first = parts[0][1]
    width = max(part.count for _, part in parts)
    flows = max(0 if part.source is None else part.source.shape[1] for _, part in parts)
    device = first.index.device
    index = torch.zeros(batch, width, dtype=torch.int64, device=device)
    valid = torch.zeros(batch, width, dtype=torch.bool, device=device)
    source, into = (torch.full((batch, flows), fill, device=device) for fill in (0, -1))
    weight, own = torch.zeros(batch, flows, device=device), torch.ones(batch, width, device=device)
    for rows, part in parts:
        row, front = torch.tensor(rows, device=device), width - part.count
        index[row, front:] = part.index
        valid[row, front:] = True if part.valid is None else part.valid
        if part.source is not None:
            flow = part.source.shape[1]
            source[row, :flow] = part.source
            into[row, :flow] = torch.where(part.into < 0, -1, part.into + front)
            weight[row, :flow] = part.weight
            own[row, front:] = part.own
    return Reduction(
        index,
        first.length,
        source=source if flows else None,
        into=into if flows else None,
        weight=weight if flows else None,
        own=own if flows else None,
        valid=None if bool(valid.all()) else valid,
    )
