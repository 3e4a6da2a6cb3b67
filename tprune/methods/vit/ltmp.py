"""LTMP merges what is alike and prunes what receives little attention, in every block, by thresholds or by counts.

With thresholds every image keeps as many tokens as it needs; with `r`, the authors' variant without learning, all
keep the same number: early blocks merge, late ones prune.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import floor
from typing import Any, ClassVar

import torch

from tprune.core import match, score, select
from tprune.core.budget import Site, Stage
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod
from tprune.methods.vit._ltmp_fit import Thresholds, even_odd


@dataclass(frozen=True)
class LTMP(TokenMethod):
    """Between attention and MLP of every block: bipartite merging of keys, then pruning by mean attention received."""

    paper = Paper(
        title="Learned Thresholds Token Merging and Pruning for Vision Transformers",
        venue="TMLR",
        year=2023,
        arxiv="2307.10780",
        code="Mxbonn/ltmp",
        checked="code",
        notes="--keep without --fit sets the counts of the authors' variant without thresholds, a fractional r spread "
        "over the blocks. Thresholds are learned, or given, one for all blocks or one per block; with them an image's "
        "tokens differ in number and a batch is padded. The fit's penalty is on the mean fraction of tokens "
        "entering, the authors' on FLOPs.",
    )
    native = ("r", "merge_threshold", "prune_threshold")
    learns = "optional"
    built_in: ClassVar[dict[str, Any]] = {"batch": 16, "lr": 1e-4}

    r: int = param(13, "tokens that leave each block", low=0)
    merge_threshold: tuple[float, ...] | None = param(
        None, "merge where the cosine of keys is above it: one number, or one per block", low=-1
    )
    prune_threshold: tuple[float, ...] | None = param(
        None, "keep what receives more attention than it: one number, or one per block", low=0
    )
    epochs: float = param(1.0, "of a fit", low=0)
    batch: int = param(128, "images per step of a fit", low=1)
    lr: float = param(5e-6, "of the prune thresholds", low=0)
    merge_lr: float = param(5e-3, "of the merge thresholds", low=0)
    temperature: float = param(0.1, "of the gates", low=1e-6)
    penalty: float = param(10.0, "on the square of what the fit keeps beside the budget", low=0)

    def weighs_by_size(self):
        """Proportional attention."""
        return True

    def varies(self):
        """Whether thresholds decide."""
        given = self.merge_threshold, self.prune_threshold
        return self.state is not None or given != (None, None)

    def check(self, shape):
        """Thresholds fit the depth, and something is left when all patches go."""
        for name in ("merge_threshold", "prune_threshold"):
            given = getattr(self, name)
            if given is not None and len(given) not in (1, shape.depth):
                raise UserError(
                    f"--set {name}: {len(given)} numbers for {shape.depth} blocks; give one, or one per block"
                )
        if self.varies() and not shape.has_cls:
            raise UserError("ltmp's thresholds may drop every patch; without a class token use --keep")

    def stages(self, shape, knob):
        """Counts, or with thresholds a place in every block that may keep all."""
        if self.varies() and knob is None:
            return [Stage(Site(layer, between=True), shape.tokens) for layer in range(shape.depth)]
        mean = self.r if knob is None else (1 - knob) * shape.tokens / 2
        due = list(accumulate([mean] * shape.depth, initial=0.0))
        stages, alive = [], shape.tokens
        for layer, (before, after) in enumerate(pairwise(due)):
            leaving = floor(after) - floor(before)
            pruned = self.pruned(leaving, layer, shape.depth, alive)
            # No more than half can merge, and no more than half of what is left is pruned.
            alive -= min(leaving - pruned, alive // 2)
            alive -= min(pruned, alive // 2)
            stages.append(Stage(Site(layer, between=True), alive))
        return stages

    def reduce(self, site, view, count, memory):
        """Merge, then prune: by the thresholds of this block, or to `count` tokens."""
        length = view.hidden.shape[1]
        metric = view.attention.key.mean(1)  # [B, N, d]
        if self.varies():
            return self.by_threshold(site.layer, view, metric)
        leaving = length - view.prefix - count
        if leaving == 0:
            return Reduction.identity(len(metric), length, metric.device)
        pruned = self.pruned(leaving, site.layer, view.depth, length - view.prefix)
        index, source, into = match.bipartite_merge(metric, leaving - pruned, view.prefix)
        received = self.importance(view)
        worth = received.gather(1, index).scatter_reduce(1, into, received.gather(1, source), "amax")
        order = worth.argsort(dim=1, descending=True, stable=True)[:, : view.prefix + count]
        slot = torch.full_like(index, -1).scatter(
            1, order, torch.arange(order.shape[1]).to(order).expand_as(order)
        )
        into = slot.gather(1, into)
        return Reduction.average(index.gather(1, order), length, source, into, view.size)

    def pruned(self, leaving, layer, depth, alive):
        """How many of those that leave a block are pruned: from one in the first to all but one in the last."""
        late = layer / max(depth - 1, 1)
        rising = int(1 + (leaving - 2) * late) if leaving > 1 else round(leaving * late)
        return min(max(rising, leaving - alive // 2), leaving)

    def importance(self, view):
        """Mean attention received, over heads and real queries, without bound for the prefix: [B, N]."""
        if view.real is None:
            received = view.attention.column_sums().mean(1) / view.hidden.shape[1]
        else:
            rows = view.attention.rows().mean(1)
            received = (rows * view.real.unsqueeze(2)).sum(1) / view.real.sum(1, keepdim=True)
        received[:, : view.prefix] = torch.inf
        return received

    def thresholds(self):
        """Of merging and of pruning: what was learned, or given, or changes nothing; one, or one per block."""
        if self.state is not None:
            return self.state["merge_threshold"], self.state["prune_threshold"]
        return self.merge_threshold or (1.0,), self.prune_threshold or (0.0,)

    def loosened(self, knob, shape):
        """Below 0.5 all prune thresholds rise, in units of what a token receives on average; above, both relax."""
        merge, prune = self.thresholds()
        more, less = max(0.0, 2 * knob - 1), max(0.0, 1 - 2 * knob)
        prune = prune * (1 - more) + less / max(1 - less, 1e-9) / shape.tokens
        return self.bind({"merge_threshold": merge + more * (1 - merge), "prune_threshold": prune})

    def fit(self, shape, keep, seed):
        """Both thresholds of every block, from the given ones or the authors' first values."""
        if keep is None or keep == 1:
            raise UserError("ltmp is fitted to a budget: give --keep below 1")
        return Thresholds(self, shape, keep)

    def by_threshold(self, layer, view, metric):
        """Rows keep what their thresholds say, in the order [even tokens, odd tokens], padded on the right."""
        batch, length = metric.shape[:2]
        if length == view.prefix:
            return Reduction.identity(batch, length, metric.device)
        place = torch.arange(length, device=metric.device)
        real = view.prunable if view.real is None else view.real
        real = real | (place < view.prefix)
        merge_above, prune_below = (values[layer % len(values)] for values in self.thresholds())
        unit = score.cosine_normalise(metric)
        usable = real & (place >= view.prefix)
        alike = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
        alike = alike.masked_fill(~usable[:, 1::2].unsqueeze(1), -torch.inf)
        best, partner = alike.max(2)
        merges = (best > merge_above) & usable[:, ::2]

        into = 2 * partner + 1
        received = self.importance(view)
        worth = received.scatter_reduce(1, into, received[:, ::2].masked_fill(~merges, -torch.inf), "amax")
        stays = real & (worth > prune_below)
        stays[:, ::2] &= ~merges

        order = even_odd(place, view.prefix)
        slots, valid = select.keep_where(stays[:, order])
        index = order[slots]
        apart = index if valid is None else index.masked_fill(~valid, length)
        slot = torch.full((batch, length + 1), -1, device=metric.device)
        slot = slot.scatter(1, apart, place[: index.shape[1]].expand_as(index))
        into = slot.gather(1, into).masked_fill(~merges, -1)
        source = place[::2].expand(batch, -1)
        reduction = Reduction.average(index, length, source, into, view.size)
        return replace(reduction, valid=valid)
