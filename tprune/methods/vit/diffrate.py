"""DiffRate prunes and then merges in every block, at rates that its authors found by gradient descent per block.

Tokens are ranked by the attention of the class token: the last are dropped, those before them flow to the most similar
of the first. With the published schedules, or with rates learned for a model and a budget; no weights are trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, ClassVar

from tprune.core import match, select
from tprune.core.budget import Site, Stage
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod
from tprune.methods.vit._diffrate_fit import Rates
from tprune.methods.vit._diffrate_schedules import FOUND

NAMES = tuple(f"{model}-{target:g}" for model, targets in FOUND.items() for target in targets)
SMALLEST = 1e-6
"""What a size becomes that negative similarities would take to nothing or below."""


@dataclass(frozen=True)
class DiffRate(TokenMethod):
    """Between attention and MLP of every block but the first: prune, then merge by plain mean."""

    paper = Paper(
        title="DiffRate: Differentiable Compression Rate for Efficient Vision Transformers",
        venue="ICCV",
        year=2023,
        arxiv="2305.17997",
        code="OpenGVLab/DiffRate",
        checked="code",
        notes="Published schedules; other models take them as fractions of the patches, by relative depth. --keep "
        "interpolates between the schedules of one model and raises the smallest to a power below it. The fit's "
        "penalty is on the mean fraction of tokens entering, as heavy as the authors' on the GFLOPs of DeiT-S. Sizes "
        "stay positive; the authors' may become NaN in the logarithm.",
    )
    needs_cls = True
    native = ("schedule",)
    learns = "optional"
    built_in: ClassVar[dict[str, Any]] = {"epochs": 2.0, "batch": 16, "lr": 0.2}

    schedule: str = param("deit-s-2.9", "model and GFLOPs of a published schedule", choices=NAMES)
    epochs: float = param(3.0, "of a fit", low=0)
    batch: int = param(1024, "images per step of a fit", low=1)
    lr: float = param(0.01, "of a fit, at its start", low=1e-12)
    min_lr: float = param(0.001, "of a fit, at its end", low=0)
    granularity: int = param(4, "tokens between two candidate counts of a fit", low=1)
    penalty: float = param(106.0, "on the square of what the fit keeps beside the budget", low=0)

    def weighs_by_size(self):
        """Proportional attention, with sizes discounted by similarity."""
        return True

    def stages(self, shape, knob):
        """What is left after each block's merge."""
        if knob is None:
            left = [merged for _, merged in self.own(shape.depth)]
        else:
            left = self.between_schedules(knob, shape.depth)
        stages, alive = [], shape.tokens
        for layer, fraction in enumerate(left):
            count = max(1, round(fraction * shape.tokens))
            if count < alive:
                alive = count
                stages.append(Stage(Site(layer, between=True), alive))
        return stages

    def between_schedules(self, knob, depth):
        """The fraction left after each block, between nothing pruned, the schedules of the model and nothing left."""
        schedules = self.schedules(depth)
        ladder = [[1.0] * depth, *([merged for _, merged in schedule] for schedule in schedules)]
        step = (1 - knob) * len(ladder)
        above = min(int(step), len(ladder) - 1)
        share = min(step - above, 1 - 1e-9)
        if above == len(ladder) - 1:
            return [fraction ** (1 / (1 - share)) for fraction in ladder[-1]]
        return [
            high + share * (low - high) for high, low in zip(ladder[above], ladder[above + 1], strict=True)
        ]

    def own(self, depth):
        """What was learned, or the schedule that was asked for, as `rates` gives it."""
        return rates(self.schedule, depth) if self.state is None else learned(self.state)

    def schedules(self, depth):
        """What was learned, or all schedules of the same model, from the largest target to the smallest."""
        if self.state is not None:
            return [learned(self.state)]
        model = self.schedule.rpartition("-")[0]
        return [rates(f"{model}-{target:g}", depth) for target in sorted(FOUND[model], reverse=True)]

    def fit(self, shape, keep, seed):
        """Rates, from equal chances for all."""
        if keep is None or keep == 1:
            raise UserError("diffrate is fitted to a budget: give --keep below 1")
        return Rates(self, shape, keep)

    def reduce(self, site, view, count, memory):
        """Rank, prune to `pruned` tokens, merge to `count`."""
        batch, length = view.hidden.shape[:2]
        prefix, alive = view.prefix, length - view.prefix
        tokens = memory.setdefault("tokens", alive)
        if count >= alive:
            return Reduction.identity(batch, length, view.hidden.device)
        pruned = self.left_after_pruning(site.layer, view.depth, tokens, alive, count)
        cls_attention = view.attention.rows(slice(0, 1)).mean(1)[:, 0, prefix:]  # [B, n]
        order = select.with_prefix(select.top_ranked(cls_attention, pruned) + prefix, prefix)
        kept, source = order[:, : prefix + count], order[:, prefix + count :]
        if pruned == count:
            return Reduction.keep(kept, length)
        return self.merge(view.hidden, kept, source, prefix, view.size)

    def merge(self, hidden, kept, source, prefix, size):
        """Every source flows to the most similar kept token, which becomes their mean; sizes count by similarity.

        Args:
            hidden: [B, N, D]; size: [B, N], or None for all ones.
            kept, source: int64 [B, prefix + K] and [B, R]; nothing flows to the prefix.
        """
        similarity, into = match.nearest(hidden, source, kept, barred=prefix)
        size = similarity.new_ones(hidden.shape[:2]) if size is None else size
        grown = size.gather(1, kept).scatter_add(1, into, similarity * size.gather(1, source))
        average = Reduction.average(kept, hidden.shape[1], source, into)
        return replace(average, resized=grown.clamp_min(SMALLEST))

    def left_after_pruning(self, layer, depth, tokens, alive, count):
        """How many of `alive` tokens the pruning leaves: its share of those that leave, as in the nearest schedule."""
        # Of equally near schedules the asked one.
        near = [self.own(depth), *self.schedules(depth)]
        found = min(near, key=lambda schedule: abs(schedule[layer][1] - count / tokens))
        before = found[layer - 1][1] if layer else 1.0
        after_pruning, after_merging = found[layer]
        share = (before - after_pruning) / max(before - after_merging, 1e-9)
        return alive - round(min(max(share, 0.0), 1.0) * (alive - count))


@cache
def rates(name: str, depth: int) -> list[tuple[float, float]]:
    """A published schedule on `depth` blocks: the fractions of patches left after pruning and after merging."""
    model, _, target = name.rpartition("-")
    pruned, merged = ([int(text) - 1 for text in row.split()] for row in FOUND[model][float(target)])
    tokens, blocks = pruned[0], len(pruned)
    rows, alive = [], 1.0
    for layer in range(depth):
        place = layer * (blocks - 1) / max(depth - 1, 1)
        first = min(int(place), blocks - 2)
        after_pruning, after_merging = (
            (row[first] + (place - first) * (row[first + 1] - row[first])) / tokens
            for row in (pruned, merged)
        )
        left = min(alive, after_pruning)
        alive = min(left, after_merging)
        rows.append((left, alive))
    return rows


@lru_cache(maxsize=64)
def learned(state):
    """Learned counts [L, 2] as `rates` gives a schedule, read once."""
    counts = state["counts"].double()
    return [tuple(row) for row in (counts / counts[0, 0]).tolist()]
