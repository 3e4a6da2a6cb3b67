"""LTP drops the tokens of a text encoder that receive less attention than their block's threshold, which is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tprune.core import select
from tprune.core.budget import Site, Stage
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.llm_context._ltp_fit import SoftThresholds, rising
from tprune.methods.tokens import TokenMethod

LEAST = 1e-5
"""What a token must receive wherever there is a threshold at all."""


@dataclass(frozen=True)
class LTP(TokenMethod):
    """Between attention and MLP of every block, by the mean over heads and queries of what a token receives."""

    paper = Paper(
        title="Learned Token Pruning for Transformers",
        venue="KDD",
        year=2022,
        arxiv="2107.00910",
        code="kssteven418/LTP",
        checked="code",
        notes="The mean is over the text's own length, so that padding changes nothing; padded=true divides by the "
        "padded length as the authors do. The class token always stays. With --keep the first thresholds keep it on "
        "the training texts, and the penalty is on the mean fraction of tokens entering, without it the authors' on "
        "the masks of real tokens. A fit runs without dropout.",
    )
    kind = "trained"
    learns = "optional"
    runs_on = ("encoder",)
    native = ("final_threshold",)
    built_in: ClassVar[dict[str, Any]] = {
        "batch": 16,
        "epochs": 1,
        "hard_epochs": 1,
        "lr": 1e-4,
        "threshold_lr": 5e-4,
    }

    final_threshold: float = param(
        0.01,
        "to which thresholds rise evenly before anything is learned: block i of n has i/n of it",
        low=0,
        high=1,
    )
    padded: bool = param(False, "whether a mean is over the padded length, as the authors have it")
    epochs: float = param(10.0, "of a fit with soft masks, which learns thresholds and weights", low=0)
    hard_epochs: float = param(5.0, "of a fit with the tokens gone, which learns weights alone", low=0)
    batch: int = param(64, "texts per step of a fit", low=1)
    lr: float = param(2e-5, "of the weights", low=0)
    threshold_lr: float = param(2e-5, "of the thresholds", low=0)
    temperature: float = param(1e-3, "of the soft masks", low=1e-6)
    regularization: float = param(0.1, "on the mean of the masks, in a fit without --keep", low=0)
    penalty: float = param(10.0, "on the square of what a fit keeps beside --keep", low=0)

    def varies(self):
        """Texts keep as many tokens as they need."""
        return True

    def stages(self, shape, knob):
        """A place in every block that may keep all."""
        return [Stage(Site(layer, between=True), shape.tokens) for layer in range(shape.depth)]

    def thresholds(self, depth):
        """One per block: what was learned, or what rises evenly to the final one."""
        if self.state is not None:
            return self.state["threshold"]
        return rising(self.final_threshold, depth)

    def loosened(self, knob, shape):
        """Below 0.5 all thresholds rise, those of later blocks more; above, they fall towards 0, where all stay."""
        more, less = max(0.0, 2 * knob - 1), max(0.0, 1 - 2 * knob)
        raised = rising(less / max(1 - less, 1e-9) / shape.tokens, shape.depth)
        found = self.thresholds(shape.depth)
        return self.bind({"threshold": found * (1 - more) + raised.to(found)})

    def fit(self, shape, keep, seed):
        """All thresholds and the model's own weights."""
        if keep == 1:
            raise UserError("ltp learns to drop tokens: give --keep below 1, or none")
        return SoftThresholds(self, shape, keep)

    def received(self, view, memory):
        """What every token receives, mean over heads and the queries there were at first: float32 [B, N]."""
        real = view.real
        lengths = real.sum(1, keepdim=True).clamp_min(1)
        if self.padded:
            lengths = torch.full_like(lengths, real.shape[1])
        lengths = memory.setdefault("lengths", lengths)
        return view.attention.column_sums(counted=real).mean(1) / lengths

    def reduce(self, site, view, count, memory):
        """Drop what is below the threshold of this block."""
        return self.dropped(site.layer, view, memory)

    def dropped(self, layer, view, memory):
        """The tokens behind block `layer`, or its attention, without those below its threshold."""
        threshold = self.thresholds(view.depth).to(view.hidden.device)[layer]
        least = torch.where(threshold == 0, -torch.inf, threshold.clamp_min(LEAST))
        stays = view.real & (~view.prunable | (self.received(view, memory) >= least))
        index, valid = select.keep_where(stays)
        return Reduction.keep(index, stays.shape[1], valid)
