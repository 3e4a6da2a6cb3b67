"""Matryoshka Multimodal Models average image tokens over squares of their grid, and learn to answer from every size.

One model is trained on nested sets of tokens, from one for the whole image to all of them; how many there are is then
chosen when it is used. Untrained it is the average-pooling baseline.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from tprune.core.budget import PROJECTOR, Stage
from tprune.core.grid import even_cells
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.fit import Fit, Plan
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class M3(TokenMethod):
    """The mean of every cell, crop by crop, behind the projector."""

    kind = "trained"
    learns = "optional"
    paper = Paper(
        title="Matryoshka Multimodal Models",
        venue="ICLR",
        year=2025,
        arxiv="2405.17430",
        code="mu-cai/matryoshka-mm",
        checked="code",
        notes="Scales are of a grid of 24 x 24, and come as near as another grid allows. --keep takes any number of "
        "tokens, in cells as nearly square as can be, and a fit with --keep learns that number too (ours).",
    )
    reads = ()
    positions = "compact"
    unit = "crop"
    native = ("tokens",)
    built_in = {"epochs": 1.0, "batch": 16, "lr": 3e-4}

    tokens: int = param(36, "tokens of a crop, of 576", low=1, high=576)
    scales: tuple[int, ...] = param((1, 9, 36, 144, 576), "what is learned, tokens of 576", low=1, high=576)
    epochs: float = param(1.0, "fit: passes over the training questions", low=0)
    batch: int = param(128, "fit: questions per step", low=1)
    lr: float = param(2e-5, "fit: peak learning rate of projector and decoder", low=0)

    def stages(self, shape, knob):
        """As many as the scale has on this grid; with --keep round(r · N), at least one."""
        if knob is None:
            return [Stage(PROJECTOR, scaled(self.tokens, shape.tokens))]
        return [Stage(PROJECTOR, max(1, round(knob * shape.tokens)))]

    def reduce(self, site, view, count, memory):
        """The mean of the tokens of every cell, in the place of the one in its middle."""
        there, total = view.prunable, view.prunable.sum(1)
        if view.grid is None:
            raise UserError("m3 pools tokens in rows and columns, and these form none")
        count = torch.as_tensor(count).expand(len(there))
        places = there.shape[1]
        # Where padding was cut off a crop, the cells are those of the whole crop.
        cells = (count * places / total.cpu()).round().long().clamp(1, places).tolist()
        owner = torch.stack([even_cells(view.grid, cell) for cell in cells]).to(there.device)
        member = functional.one_hot(owner.where(there, max(cells)), max(cells) + 1)[..., :-1]  # [B, N, K]
        size = member.sum(1)
        middle = (member.cumsum(1) * member == ((size + 1) // 2).unsqueeze(1)).int().argmax(1)  # [B, K]
        valid = None if bool((size > 0).all()) else size > 0
        if bool((size <= 1).all()):
            return Reduction.keep(middle, places, valid)
        mean = member.transpose(1, 2) / size.clamp_min(1).unsqueeze(2)
        return replace(Reduction.mix(mean.float(), middle), valid=valid)

    def fit(self, shape, keep, seed):
        """All scales at once."""
        return Nested(self, shape, keep)


class Nested(Fit):
    """The answers at every scale, the decoder and the projector learning."""

    tunes = "language"

    def __init__(self, method: M3, shape, keep):
        super().__init__(shape)
        self.method, self.sites = method, (PROJECTOR,)
        self.plan = Plan(method.epochs, method.batch, method.lr, warmup=0.03)
        own = [] if keep is None else [max(1, round(keep * shape.tokens)) / shape.tokens * 576]
        self.scales = sorted({*method.scales, *own})
        self.scale = self.scales[0]

    def at(self, site, view, memory):
        """The cells of the scale whose turn it is."""
        total = view.prunable.sum(1)
        count = torch.tensor([scaled(self.scale, number) for number in total.tolist()])
        return self.method.reduce(site, view, count, memory)

    def losses(self, outputs, labels, memory, dense):
        """The mean over scales of the answers' cross-entropy."""
        found, again, inputs = {}, memory["again"], memory["inputs"]
        for scale in self.scales:
            self.scale = scale
            logits = outputs if scale == self.scales[0] else again(inputs)
            found[f"{scale:g}"] = functional.cross_entropy(logits, labels) / len(self.scales)
        self.scale = self.scales[0]
        return found

    def state(self):
        """Nothing but the model's weights."""
        return {}


def scaled(tokens: float, places: int) -> int:
    """A number of tokens of a square grid of 576, on one of so many places: a square, at least one."""
    return max(1, round((tokens * places / 576) ** 0.5)) ** 2
