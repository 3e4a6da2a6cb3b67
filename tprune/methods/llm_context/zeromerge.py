"""ZeroMerge: what loses its place in the cache is averaged into an entry that stands for many.

Heavy hitters of forgetful attention and the latest entries stay as they are; the rest of the prompt becomes a few
means. Each mean counts in the softmax for as many tokens as it stands for, and takes in, step by step, the entry
that has received least.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.core.attending import sum_over_group
from tprune.core.cache import Evict, Fold, Merge
from tprune.core.select import complement, top, worst_between
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.cache import CacheMethod
from tprune.methods.cache_view import LayerView, StepView


@dataclass(frozen=True)
class ZeroMerge(CacheMethod):
    """A cache of three parts: means, heavy hitters and a tail."""

    paper = Paper(
        title="ZeroMerge: Parameter-Free KV Cache Compression for Memory-Efficient Long-Context LLMs",
        venue="arXiv",
        year=2025,
        arxiv="2503.10714",
        code="SusCom-Lab/ZeroMerge",
        checked="code",
        notes="Defaults are the functions' own; the main experiment has tail=0.4 and scale=0.6 at a budget of 0.05. "
        "The means stand where the first entry of each was, and the newest entry takes the slot of the one that left, "
        "where the authors hold the three parts in order: attention does not see the difference.",
    )
    takes = ()
    tail: float = param(0.1, "latest entries that stay: a part of the budget, or a number from 1 on", low=0)
    means: float = param(
        1, "entries that are means: a number, or below 1 a part of the budget less the tail", low=0
    )
    scale: float = param(
        1.0, "times the logarithm of how many an entry stands for is added to its logits", low=0
    )
    forgetting: float = param(0.98, "what a query counts of the next one", low=0, high=1)
    metric: str = param("dot", "which mean takes an entry in: that of nearest key", choices=("dot", "l2"))
    update: str = param("max", "the score of a mean, of its entries'", choices=("max", "sum"))

    def parts(self, count: int) -> tuple[int, int]:
        """How many of `count` entries are the tail, and how many are means."""
        tail = max(2, int(self.tail if self.tail >= 1 else self.tail * count))
        return tail, max(1, int(self.means if self.means >= 1 else self.means * (count - tail)))

    def check_length(self, length: int, count: int) -> None:
        """Tail and means must leave room for heavy hitters."""
        tail, means = self.parts(count)
        if tail + means >= count:
            raise UserError(
                f"zeromerge: {count} of {length} entries leave no heavy hitter beside a tail of {tail} and {means} "
                "means; raise --keep, or lower --set tail=… or means=…"
            )

    def start(self, layer: LayerView, count: int) -> Evict:
        """The tail, the entries that received most, and the others in runs of equal length, averaged."""
        score = sum_over_group(layer.attention.column_sums(self.forgetting), layer.groups)  # [B, G, T]
        others = torch.zeros_like(score)
        layer.state.update(score=score, others=others, mean=others, means=0, tail=0)
        if count == layer.length:
            return Evict.nothing(*score.shape, score.device)
        tail, means = self.parts(count)
        body = layer.length - tail
        heavy = top(score[..., :body], count - tail - means)
        rest = complement(heavy.flatten(0, 1), body).view(*score.shape[:2], -1)  # [B, G, M], ascending
        run, first = _runs(rest.shape[-1], means, score.device)
        leader = rest[..., first]  # [B, G, R]
        kind = "amax" if self.update == "max" else "sum"
        runs = run.expand_as(rest)
        best = torch.zeros_like(leader, dtype=score.dtype)
        best.scatter_reduce_(2, runs, score.gather(2, rest), kind, include_self=False)
        size = torch.bincount(run, minlength=means).to(score.dtype).expand_as(best)
        others = others.scatter(2, leader, size - 1)
        layer.state.update(
            score=score.scatter(2, leader, best),
            others=others,
            mean=torch.zeros_like(score).scatter(2, leader, 1.0),
            bias=self.scale * others.log1p(),
            means=means,
            tail=tail,
        )
        latest = torch.arange(body, layer.length, device=score.device).expand(*score.shape[:2], -1)
        index = torch.cat([heavy, leader, latest], dim=-1).sort(dim=-1).values
        return Merge.of(index, rest, leader.gather(2, runs), layer.length)

    def step(self, view: StepView) -> Fold:
        """The entry that received least, and is neither mean nor tail, joins the mean of nearest key."""
        state = view.state
        score = self.forgetting * state["score"] + sum_over_group(view.attention_rows(), view.groups)
        free = score.masked_fill(state["mean"] > 0, torch.inf)
        slot = worst_between(free, view.position, view.fillers, state["tail"])  # [B, G]
        into = self._nearest(view, slot)
        one, other = slot.unsqueeze(2), into.unsqueeze(2)
        count = 1 + state["others"].gather(2, one), 1 + state["others"].gather(2, other)
        scores = score.gather(2, one), score.gather(2, other)
        taken = torch.maximum(*scores) if self.update == "max" else sum(scores)
        state["score"] = score.scatter(2, other, taken)
        state["others"] = state["others"].scatter(2, other, sum(count) - 1)
        state["bias"] = self.scale * state["others"].log1p()
        return Fold(slot, into, (count[0] / sum(count)).squeeze(2))

    def _nearest(self, view: StepView, slot: Tensor) -> Tensor:
        """The mean whose key is nearest to that of `slot` [B, G]: int64 [B, G]."""
        means = view.state["means"]
        most = means if isinstance(means, int) else int(means.max())
        there, means = view.state["mean"].topk(most, dim=-1)  # [B, G, R]
        width = view.key.shape[3]
        key = view.key.gather(2, slot[..., None, None].expand(-1, -1, 1, width)).float()
        keys = view.key.gather(2, means.unsqueeze(3).expand(-1, -1, -1, width)).float()
        near = (keys * key).sum(3) if self.metric == "dot" else -(keys - key).square().sum(3)
        return means.gather(2, near.masked_fill(there == 0, -torch.inf).argmax(2, keepdim=True)).squeeze(2)


def _runs(length: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`length` places cut into `count` runs, the first of them longer by one: each one's run, each run's first."""
    size, longer = divmod(length, count)
    sizes = torch.full((count,), size, device=device)
    sizes[:longer] += 1
    run = torch.repeat_interleave(torch.arange(count, device=device), sizes, output_size=length)
    return run, sizes.cumsum(0) - sizes
