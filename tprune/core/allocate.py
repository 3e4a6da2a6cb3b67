"""How a budget of sparsity is shared out among the matrices of a model, or between kinds of unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from tprune.core.select import floor_count


def spread_by_outliers(outliers: Sequence[float], sparsity: float, spread: float) -> list[float]:
    """Sparsities around `sparsity`, lower where there are more outliers (OWL, equation 2 as the code has it).

    The shares of outliers are stretched to [0, 2 · spread] and shifted to the mean density 1 - sparsity; what falls to
    0 or below becomes 0.01, as in the authors' code. Where all are equal, so are the sparsities.

    Args:
        outliers: one figure per block; only their proportions matter.
        sparsity: the mean, over blocks.
        spread: λ, the largest distance from it that even outliers could lead to.
    """
    share = torch.tensor(outliers, dtype=torch.float64)
    width = share.max() - share.min()
    if width == 0:
        return [sparsity] * len(outliers)
    density = (share - share.min()) / width * 2 * spread
    found = 1 - (density - density.mean() + 1 - sparsity)
    return torch.where(found <= 0, 0.01, found).clamp_max(1.0).tolist()


def erk(shapes: Sequence[tuple[int, int]], sparsity: float) -> list[float]:
    """Sparsities by the Erdős–Rényi kernel rule: the density of a matrix [R, C] is proportional to (R + C) / (R · C).

    What would be denser than dense stays dense, and the others share the rest; together they lose `sparsity` of all
    weights (Evci et al., arXiv 1911.11134).
    """
    sizes = torch.tensor([rows * columns for rows, columns in shapes], dtype=torch.float64)
    raw = torch.tensor([rows + columns for rows, columns in shapes], dtype=torch.float64) / sizes
    dense = torch.zeros(len(shapes), dtype=torch.bool)
    while not bool(dense.all()):
        left = (1 - sparsity) * sizes.sum() - sizes[dense].sum()
        scale = left / (raw * sizes)[~dense].sum()
        over = ~dense & (raw * scale > 1)
        if not bool(over.any()):
            return torch.where(dense, 0.0, 1 - raw * scale).tolist()
        dense |= over
    return [0.0] * len(shapes)


def fill_by_score(scores: Sequence[float], sizes: Sequence[int], sparsity: float, most: float) -> list[float]:
    """Sparsities of matrices whose weights kept are proportional to their scores, as far as that goes.

    Each keeps ceil(size · (1 - most)) at least; what is left of the budget is dealt out in proportion to the scores,
    again and again, among those that are not full, so that together they keep int(total · (1 - sparsity)).

    Args:
        scores: one per matrix, not negative.
        sizes: their numbers of weights.
        sparsity: of all of them together.
        most: of one of them; at least `sparsity`.
    """
    size = torch.tensor(sizes, dtype=torch.int64)
    score = torch.tensor(scores, dtype=torch.float64)
    least = torch.tensor([math.ceil(count * (1 - most) - 1e-9) for count in sizes])
    kept, left = least, floor_count(int(size.sum()), 1 - sparsity) - int(least.sum())
    while left > 0:
        free = kept < size
        part = torch.where(free, score, 0.0)
        part = part if bool(part.sum() > 0) else free.double()
        given = torch.minimum((part / part.sum() * left).floor().long(), size - kept)
        if not bool(given.any()):
            # Fewer are left than there are matrices: one each, the highest scores first.
            first = part.masked_fill(~free, -1).argsort(descending=True, stable=True)[:left]
            given[first] = free[first].long()
        kept, left = kept + given, left - int(given.sum())
    return (1 - kept.double() / size).tolist()


def share_out(offset: Tensor, most: Tensor, total: Tensor) -> Tensor:
    """Whole counts that sum to `total` over layers: one number for all, plus each layer's offset, from 0 to `most`.

    Args:
        offset: float64 [L, B].
        most: int64 [B].
        total: int64 [B], at most L · most.

    Returns:
        int64 [L, B].
    """
    most = most.double()
    low, high = -offset.amax(0).clamp_min(0) - 1, most - offset.amin(0).clamp_max(0)
    for _ in range(60):
        middle = (low + high) / 2
        few = (middle + offset).clamp_min(0).minimum(most).sum(0) < total
        low, high = torch.where(few, middle, low), torch.where(few, high, middle)
    share = (high + offset).clamp_min(0).minimum(most).cumsum(0).round()
    return share.diff(dim=0, prepend=torch.zeros_like(share[:1])).long()


def smallest_of_all(scores: Callable[[], Iterable[Tensor]], count: int) -> list[int]:
    """How many of the `count` smallest scores of all tensors together are in each; of equals the earlier tensors'.

    Works with one tensor at a time, in three passes: the threshold is found by the upper and then by the lower half of
    the scores' bits, so that nothing is sorted and no approximation is made.

    Args:
        scores: gives the float32 tensors, the same ones at every call.
        count: 0 to the number of all entries.
    """
    chosen = -1
    below = 0
    for high in (True, False):
        histogram = sum(_histogram(score, None if high else chosen) for score in scores())
        place = int((histogram.cumsum(0) + below < count).sum())
        below += int(histogram[:place].sum())
        chosen = place if high else (chosen << 16) + place
    found, equal = [], []
    for score in scores():
        keys = _keys(score)
        found.append(int((keys < chosen).sum()))
        equal.append(int((keys == chosen).sum()))
    left = count - sum(found)
    for place, ties in enumerate(equal):
        found[place] += min(ties, left)
        left -= min(ties, left)
    return found


def cheapest_lines(costs: Sequence[tuple[Tensor, Tensor]], count: int) -> list[tuple[Tensor, Tensor]]:
    """Which rows and columns of all matrices go, the cheapest first, as long as at most `count` weights go with them.

    Rows and columns of a matrix share weights, and what went with one does not count again. Of equals those of the
    earlier matrix go first, of one matrix its rows, and of these the lower indices.

    Args:
        costs: float32 [R] and [C] of every matrix.
        count: of weights.

    Returns:
        bool [R] and [C] of every matrix.
    """
    orders = [torch.cat(pair).sort(stable=True) for pair in costs]
    more = []
    for (rows, columns), (_, index) in zip(costs, orders, strict=True):
        is_row = index < len(rows)
        gone = (is_row.cumsum(0), (~is_row).cumsum(0))
        total = gone[0] * len(columns) + gone[1] * len(rows) - gone[0] * gone[1]
        more.append(total.diff(prepend=total.new_zeros(1)))
    sorted_all = torch.cat([values for values, _ in orders]).argsort(stable=True)
    chosen = sorted_all[: int((torch.cat(more)[sorted_all].cumsum(0) <= count).sum())]
    whose = torch.arange(len(orders)).repeat_interleave(torch.tensor([len(part) for part in more]))
    counts = torch.bincount(whose.to(chosen.device)[chosen], minlength=len(orders)).tolist()
    found = []
    for (rows, _), (_, index), number in zip(costs, orders, counts, strict=True):
        lines = torch.zeros(len(index), dtype=torch.bool, device=index.device)
        lines[index[:number]] = True
        found.append((lines[: len(rows)], lines[len(rows) :]))
    return found


def _keys(score: Tensor) -> Tensor:
    """Whole numbers from 0 to 2³² - 1 in the order of the scores: int64, flat."""
    bits = (score.flatten().float() + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() + 2**31


def _histogram(score: Tensor, high: int | None) -> Tensor:
    """How often each upper half of the keys occurs, int64 [65536]; or each lower half where the upper one is `high`."""
    keys = _keys(score)
    halves = keys >> 16 if high is None else keys[keys >> 16 == high] & 0xFFFF
    return torch.bincount(halves, minlength=65536)


def widths_by_importance(importance: Sequence[float], sparsity: float, sharpness: float) -> list[float]:
    """What share of its width every block keeps, 1 - sparsity in the mean, more where importance is higher (CFSP).

    Proportional to the logistic function of sharpness · (importance - its mean). Where the widest would keep all or
    more, all distances from the mean shrink until it keeps a little less.

    Args:
        importance: one figure per block.
        sparsity: the mean share that goes.
        sharpness: 0 keeps all equal.
    """
    given = torch.tensor(importance, dtype=torch.float64)
    weight = (sharpness * (given - given.mean())).sigmoid()
    mean, most = weight.mean(), weight.max()
    if most / mean * (1 - sparsity) >= 1 and most > mean:
        weight = mean + (weight - mean) * (mean * sparsity / (1 - sparsity)) / (most - mean) / 1.05
    return (weight / weight.mean() * (1 - sparsity)).tolist()


def two_lists(
    first: Tensor, second: Tensor, costs: tuple[int, int], budget: float, least: int = 1
) -> tuple[int, int]:
    """How many units of two kinds to keep, from the heads of their lists, so that their scores sum to the most.

    For every number of the first kind that the budget allows, as many of the second as fit; of equals the fewest of the
    first (OPTIN).

    Args:
        first, second: scores [U] and [V], in the order in which units are kept.
        costs: of a unit of each kind.
        budget: what the kept units may cost.
        least: how many of each kind stay; the budget must allow them.
    """
    one, other = (
        torch.cat([scores.new_zeros(1), scores.cumsum(0)]) for scores in (first.double(), second.double())
    )
    most = min(len(first), int((budget - least * costs[1]) / costs[0] + 1e-9))
    counts = torch.arange(least, most + 1, device=one.device)
    fit = ((budget - counts * costs[0]) / costs[1] + 1e-9).long().clamp_max(len(second))
    best = int((one[counts] + other[fit]).argmax())
    return least + best, int(fit[best])
