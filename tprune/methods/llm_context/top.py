"""ToP drops the tokens of a text encoder whose rank by received attention is in a bin that its layer's gates close."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tprune.core import ranks, select
from tprune.core.budget import Site, Stage, scale_layer
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.llm_context._top_fit import Gates
from tprune.methods.tokens import TokenMethod

DEPTH = 12
"""Of the paper's models."""


@dataclass(frozen=True)
class ToP(TokenMethod):
    """Before a block, by ranks among the tokens still there; which bins of ranks stay in which block is learned."""

    paper = Paper(
        title="Constraint-aware and Ranking-distilled Token Pruning for Efficient Transformer Inference",
        venue="KDD",
        year=2023,
        arxiv="2306.14393",
        code="microsoft/Moonlit",
        checked="code",
        notes="Tokens really leave, so that those that left ask for none and padding asks for none; in the authors' "
        "code both go on asking. The constraint is on the mean fraction of tokens entering, theirs on multiplications. "
        "A fit runs without dropout.",
    )
    kind = "trained"
    learns = "required"
    runs_on = ("encoder",)
    built_in: ClassVar[dict[str, Any]] = {"batch": 16, "epochs": 4, "gate_lr": 0.2}

    first: int = param(2, "the first block, of twelve, before which tokens leave", low=1, high=11)
    bins: int = param(50, "of ranks", low=2)
    epochs: float = param(40.0, "of a fit", low=0)
    batch: int = param(32, "texts per step of a fit", low=1)
    lr: float = param(2e-5, "of the weights", low=0)
    gate_lr: float = param(0.02, "of the gates and of the constraint's multipliers", low=0)
    ramp: float = param(
        0.25, "fraction of the steps in which the budget tightens from everything", low=0, high=1
    )
    distillation: float = param(2.0, "temperature of the unpruned model's answers", low=1e-3)
    topk: int = param(
        20, "tokens whose ranks are distilled, those that the unpruned model's last block reads most", low=2
    )
    ranking: float = param(1e-2, "weight of that, at the start; it falls as the budget tightens", low=0)

    def varies(self):
        """Texts keep what their lengths make of the bins."""
        return True

    def begins(self, depth):
        """The first block before which tokens leave."""
        return max(1, scale_layer(self.first, DEPTH, depth))

    def stages(self, shape, knob):
        """A place before every block from the first on, which may keep all."""
        return [Stage(Site(layer), shape.tokens) for layer in range(self.begins(shape.depth), shape.depth)]

    def loosened(self, knob, shape):
        """Above 0.5 closed bins open, the most open gates first; below, open ones close, the least open first."""
        kept, worth = self.state["keep"], self.state["worth"]
        more, less = max(0.0, 2 * knob - 1), max(0.0, 1 - 2 * knob)
        there = int(kept.sum())
        count = round(there * (1 - less) + (kept.numel() - there) * more)
        order = ranks.rank(torch.where(kept > 0, worth + 1e4, worth).flatten()).view_as(kept)
        return self.bind({"keep": (order < count).to(kept), "worth": worth})

    def fit(self, shape, keep, seed):
        """The gates and the model's own weights."""
        if keep is None or keep == 1:
            raise UserError("top is fitted to a budget: give --keep below 1")
        return Gates(self, shape, keep, seed)

    def received(self, view):
        """What every token receives, mean over heads and real queries: float32 [B, N]."""
        return view.attention.column_sums(counted=view.real).mean(1) / view.real.sum(1, keepdim=True)

    def binned(self, score, alive):
        """The bin of every token's rank among those `alive`, bool [B, N]; `bins` for all others: int64 [B, N]."""
        place = ranks.rank(score.masked_fill(~alive, -torch.inf)) / (alive.sum(1, keepdim=True) + 1e-6)
        return (place.clamp(0, 1) * self.bins).long().clamp_max(self.bins).masked_fill(~alive, self.bins)

    def reduce(self, site, view, count, memory):
        """Drop the tokens in closed bins."""
        kept = self.state["keep"][site.layer - self.begins(view.depth)].bool()
        behind = self.binned(self.received(view)[:, 1:], view.real[:, 1:])
        stays = view.real.clone()
        stays[:, 1:] = torch.cat([kept, kept.new_zeros(1)])[behind]
        index, valid = select.keep_where(stays)
        return Reduction.keep(index, stays.shape[1], valid)
