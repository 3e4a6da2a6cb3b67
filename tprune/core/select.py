"""Choosing under a count: exact, stable, lower index first among equals.

Scores are float, larger is better unless said otherwise; NaN is refused by the callers that make scores.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores along the last axis, ascending by index: [..., N] -> [..., count].

    Ties go to the lower index, on every device.
    """
    order = score.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values


def top_ranked(score: Tensor, count: int) -> Tensor:
    """As `top`, but in descending order of score."""
    return score.argsort(dim=-1, descending=True, stable=True)[..., :count]


def places(marked: Tensor) -> tuple[Tensor, Tensor]:
    """Where `marked` [B, N] is True, ascending: [B, R] and which are real [B, R]; shorter rows repeat their first."""
    widest = int(marked.sum(1).max())
    index = marked.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :widest]
    real = marked.gather(1, index)
    return torch.where(real, index, index[:, :1]), real


def mark(index: Tensor, real: Tensor | None, length: int) -> Tensor:
    """`places` undone: bool [B, length], True at those `index` [B, R] that are `real` [B, R] (None: all of them)."""
    index = index if real is None else torch.where(real, index, length)
    marked = torch.zeros(len(index), length + 1, dtype=torch.bool, device=index.device)
    return marked.scatter(1, index, True)[:, :length]


def complement(index: Tensor, length: int) -> Tensor:
    """What `index` [B, K] leaves out of 0 .. length - 1, ascending: int64 [B, length - K]."""
    taken = torch.zeros(index.shape[0], length, dtype=torch.int8, device=index.device).scatter(1, index, 1)
    return taken.argsort(dim=1, stable=True)[:, : length - index.shape[1]]


def representatives(bits: Tensor, anchor: Tensor, free: Tensor, count: int) -> Tensor:
    """`count` units that stand for all that are `free`: every n-th in the order of their distance from an anchor.

    Units of a like pattern have a like distance, so that what is picked at equal steps is spread over the patterns;
    no two patterns are ever compared (KVCrush).

    Args:
        bits: bool [..., N, F], the pattern of every unit; it broadcasts with `free`.
        anchor: bool [..., F]; the distance is Hamming's, of equals the lower index comes first.
        free: bool [..., N], what may be picked: equally many, at least `count`, in every row.
        count: how many, at least one.

    Returns:
        int64 [..., count], in the order of distance.
    """
    distance = torch.where(free, (bits != anchor.unsqueeze(-2)).sum(-1), bits.shape[-1] + 1)
    order = distance.argsort(dim=-1, stable=True)
    step = int(free.reshape(-1, free.shape[-1])[0].sum()) // count
    return order[..., : count * step : step]


def keep_prefix_and_top(score: Tensor, count: int, prefix: int) -> Tensor:
    """Indices [B, prefix + count]: the first `prefix` tokens, and the `count` best of the rest, ascending.

    Args:
        score: [B, N - prefix], the scores of the tokens behind the prefix.
        count: how many of them stay.
        prefix: how many leading tokens (CLS, distillation, registers) are never touched.
    """
    return with_prefix(top(score, count) + prefix, prefix)


def with_prefix(index: Tensor, prefix: int) -> Tensor:
    """Indices [..., prefix + K]: the `prefix` leading tokens, and behind them `index` [..., K] as it stands."""
    head = torch.arange(prefix, device=index.device).expand(*index.shape[:-1], prefix)
    return torch.cat([head, index], dim=-1)


def best_of(score: Tensor, group: Tensor, count: Tensor) -> Tensor:
    """Where the `count` (int64 [B]) largest scores [B, N] of a group, bool [B, N], are: bool [B, N]; or all of it."""
    order = score.masked_fill(~group, -torch.inf).argsort(dim=1, descending=True, stable=True)
    place = torch.arange(score.shape[1], device=score.device)
    return group & torch.zeros_like(group).scatter(1, order, place < count.unsqueeze(1))


def above(
    score: Tensor, group: Tensor, threshold: float, least: int = 1, most: Tensor | None = None
) -> Tensor:
    """Where the scores [B, N] of a group, bool [B, N], are above a threshold: bool [B, N].

    Args:
        score, group, threshold: see above.
        least: the best are there where fewer are above it, or the whole group.
        most: int64 [B], the best alone where more are above it; `least` takes precedence.
    """
    number = ((score > threshold) & group).sum(1)
    number = number if most is None else number.minimum(most)
    return best_of(score, group, number.clamp_min(least))


def keep_where(stays: Tensor) -> tuple[Tensor, Tensor | None]:
    """The places that `stays` [B, N] marks, in their order, whatever their number.

    Returns:
        index [B, K] and valid [B, K]; rows that keep fewer than K are padded on the right with places that do not
        stay, valid is then False there, and None where all rows keep K.
    """
    counts = stays.sum(1)
    fewest, most = (0, 0) if len(counts) == 0 else torch.stack(counts.aminmax()).tolist()
    index = (~stays).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
    if fewest == most:
        return index, None
    return index, torch.arange(most, device=stays.device) < counts.unsqueeze(1)


def all_but_best(score: Tensor, group: Tensor, marked: Tensor, count: int | Tensor) -> Tensor:
    """The marked places without the `count` best of every group among them; ties: the lower place is better.

    Args:
        score: [B, N].
        group: int64 [B, N], not negative.
        marked: bool [B, N].
        count: of each group at most; int64 [B, N] where groups differ, the same for all tokens of one.

    Returns:
        bool [B, N].
    """
    group = group.where(marked, -1)
    order = score.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))
    place, grouped = torch.arange(score.shape[1], device=score.device), group.gather(1, order)
    begins = torch.ones_like(marked)
    begins[:, 1:] = grouped[:, 1:] != grouped[:, :-1]
    rank = place - torch.where(begins, place, 0).cummax(1).values
    return marked & (torch.zeros_like(order).scatter(1, order, rank) >= count)


def keep_protected_and_top(score: Tensor, drop: Tensor, prunable: Tensor) -> tuple[Tensor, Tensor | None]:
    """Drop the `drop[b]` worst prunable tokens of every row; all others stay, in ascending order.

    Args:
        score: [B, N]; only the prunable entries are read.
        drop: int64 [B] on the CPU, how many prunable tokens leave each row.
        prunable: bool [B, N].

    Returns:
        index [B, K] and valid [B, K]; rows that keep fewer than K tokens are padded on the left with
        their first token, valid is then False there, and None where all rows keep K.
    """
    length = score.shape[1]
    score = torch.where(prunable, score.float(), torch.inf)
    order = score.argsort(dim=1, descending=True, stable=True)
    kept = length - drop
    widest = int(kept.max())
    rank = torch.arange(widest, device=score.device)
    if bool((kept == widest).all()):
        return order[:, :widest].sort(dim=1).values, None
    valid = rank < kept.to(score.device)[:, None]
    index = torch.where(valid, order[:, :widest], -1).sort(dim=1).values
    return index.clamp_min(0), index >= 0


def keep_prunable_top(score: Tensor, count: int | Tensor, prunable: Tensor) -> tuple[Tensor, Tensor | None]:
    """The `count` best prunable tokens of every row and all others, as `keep_protected_and_top` gives them.

    Args:
        score: [B, N]; only the prunable entries are read.
        count: how many prunable tokens stay: one number, or int64 [B] on the CPU.
        prunable: bool [B, N].
    """
    drop = prunable.sum(1).cpu() - count
    return keep_protected_and_top(score, drop.clamp_min(0), prunable)


def keep_first(order: Tensor, count: int | Tensor, prunable: Tensor) -> tuple[Tensor, Tensor | None]:
    """The first `count` picks of every row and all that is not prunable, as `keep_protected_and_top` gives them.

    Args:
        order: int64 [B, K], the picks in their order, prunable tokens alone as far as they are counted.
        count: at most K: one number, or int64 [B] on the CPU.
        prunable: bool [B, N].
    """
    rank = torch.arange(order.shape[1], 0, -1, device=order.device).expand(order.shape)
    score = torch.zeros(prunable.shape, device=order.device)
    # What is picked twice (a row's picks have run out) counts by its first.
    score = score.scatter_reduce(1, order, rank.float(), "amax")
    return keep_prunable_top(score, count, prunable)


def keep_ends_and_top(score: Tensor, count: int, first: int, last: int) -> Tensor:
    """Indices [..., count] of the `first` and the `last` entries and the best of those between, ascending.

    Args:
        score: [..., N]; only what lies between the ends is read.
        count: how many entries stay in all, first + last <= count <= N.
        first, last: how many entries at each end stay whatever they score.
    """
    length = score.shape[-1]
    if count == length:
        return torch.arange(length, device=score.device).expand(score.shape)
    between = top(score[..., first : length - last], count - first - last) + first
    ends = torch.arange(length, device=score.device)
    shape = (*score.shape[:-1], -1)
    return torch.cat([ends[:first].expand(shape), between, ends[length - last :].expand(shape)], dim=-1)


def worst_between(score: Tensor, position: Tensor, first: int | Tensor, last: int | Tensor) -> Tensor:
    """The slot of the worst entry that neither end protects, int64 [B, G]; of equals the latest.

    Args:
        score: [B, G, N], the latest entry in the last slot, the others in any order behind the first slots.
        position: int64 [B, G, N], when each entry came; the last slot's is the largest.
        first: how many leading slots stay whatever they score (fillers included).
        last: how many of the latest entries stay whatever they score; all of them are there.
            Both are one number, or int64 [B] where rows differ.
    """
    begin = first if isinstance(first, int) else 0
    score, position = score[..., begin:], position[..., begin:]
    safe = position > position[..., -1:] - (last if isinstance(last, int) else last[:, None, None])
    if not isinstance(first, int):
        safe |= torch.arange(score.shape[-1], device=score.device) < first[:, None, None]
    score = score.masked_fill(safe, torch.inf)
    better = score > score.amin(dim=-1, keepdim=True)
    return begin + position.masked_fill(better, -1).argmax(dim=-1)


def floor_count(total: int, fraction: float) -> int:
    """floor(total · fraction), undisturbed by the rounding of the product (100 · 0.29 is 29)."""
    return int(total * fraction + 1e-9)


def keep_by_cost(score: Tensor, cost: Tensor, budget: float, strict: bool = False) -> Tensor:
    """Keep the best units, whose summed cost comes nearest to `budget`: bool [U].

    Args:
        score: [U], larger is better; among equals the lower index stays.
        cost: [U].
        budget: what the kept units may cost.
        strict: of the units found, drop the worst, and what ties with it (the threshold rule of FLAP's code).
    """
    order = score.argsort(descending=True, stable=True)
    total = torch.cat([torch.zeros(1, dtype=torch.float64), cost[order].double().cumsum(0)])
    if strict:
        return score > score[order[(total[1:] - budget).abs().argmin()]]
    keep = torch.zeros_like(score, dtype=torch.bool)
    keep[order[: int((total - budget).abs().argmin())]] = True
    return keep


def threshold_by_cost(score: Tensor, cost: Tensor, budget: float) -> Tensor:
    """The smallest of the scores [N] such that what lies above it costs less than `budget`, by costs [N]."""
    ordered, order = score.sort()
    total = cost.to(score.device, torch.float64)[order].cumsum(0)
    last = torch.searchsorted(ordered, ordered, right=True) - 1
    fits = total[-1] - total[last] < budget
    return ordered[int(fits.to(torch.int8).argmax())] if bool(fits.any()) else ordered[-1]
