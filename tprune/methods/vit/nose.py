"""NOSE removes whole attention sublayers: those without which what the model gives out is about as varied as before.

They are chosen one after the other by the entropy of the outputs. A fit then fades them out into an identity map,
x <- (2 - λ)·x + λ·attn(x) with λ from 1 to 0, and the MLPs behind them learn to do their work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tprune.core.budget import Site, Stage, bisect, mean_entering, scale_layer
from tprune.core.statistics import gaussian_entropy
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod
from tprune.methods.vit._nose_fit import Dilution

DEPTH = 12


@dataclass(frozen=True)
class NOSE(TokenMethod):
    """No token leaves; no token enters an attention that is removed, and --keep counts it so: 1 - removed / 2L."""

    paper = Paper(
        title="MLP Can Be A Good Transformer Learner",
        venue="CVPR",
        year=2024,
        arxiv="2404.05657",
        code="sihaoevery/lambda_vit",
        checked="code",
        notes="The authors' loop of the selection is not public; it is as they describe it in their issues 1 to 3: "
        "entropy at the class head, against the whole model, an attention left out is x <- x. They choose on 33,280 "
        "images. A fit fades by steps, not by epochs, without their augmentation. Without a fit x <- x stays; the "
        "paper has no such model. On the built-in scenes a fit ends there too: 2x takes longer to "
        "learn. One attention always stays: --keep reaches 13/24 in 12 blocks.",
    )
    kind = "calibrated"
    reads = ()
    native = ("ratio", "layers")
    learns = "optional"
    calibrates = True
    built_in: ClassVar[dict[str, Any]] = {"epochs": 3.0, "batch": 16, "lr": 3e-4, "identity": 1.0}

    ratio: float = param(0.4, "fraction of the attention sublayers removed", low=0, high=1)
    layers: tuple[int, ...] = param(
        (),
        "blocks, of 12, that lose their attention instead of those chosen by entropy",
        low=0,
        high=DEPTH - 1,
    )
    images: int = param(512, "calibration images for the choice", low=2)
    fade: float = param(0.75, "fraction of a fit after which λ is 0", low=1e-6, high=1)
    identity: float = param(
        2.0,
        "what a fit lets a block multiply its input by, in place of attention: 2, or 1",
        choices=(1.0, 2.0),
    )
    epochs: float = param(400.0, "of a fit", low=0)
    batch: int = param(2048, "images per step of a fit", low=1)
    lr: float = param(2e-3, "of a fit, at its peak", low=1e-12)
    min_lr: float = param(1e-5, "of a fit, at its end", low=0)
    warmup: float = param(0.0125, "fraction of the steps of a fit", low=0, high=1)
    weight_decay: float = param(0.05, "of a fit", low=0)

    def stages(self, shape, knob):
        """The first so many blocks of the order skip their attention; those that nothing has chosen come last."""
        order = [] if self.state is None else self.state["order"].tolist()
        order += [layer for layer in range(shape.depth) if layer not in order]
        return [Stage(Site(layer), shape.tokens, skips=True) for layer in order[: self.removed(shape, knob)]]

    def removed(self, shape, knob):
        """How many attention sublayers go, of all but one."""
        if knob is not None:
            return round((1 - knob) * (shape.depth - 1))
        if self.layers:
            return min(len(self.scaled(shape.depth)), shape.depth - 1)
        return min(round(self.ratio * shape.depth), shape.depth - 1)

    def scaled(self, depth):
        """The blocks that were named."""
        return sorted({scale_layer(layer, DEPTH, depth) for layer in self.layers})

    def budget(self, shape, keep):
        """How many go at `keep`."""
        if keep is None:
            return self.removed(shape, None)

        def measure(knob):
            return mean_entering(self.stages(shape, knob), shape.tokens, shape.depth)

        return self.removed(shape, bisect(measure, keep))

    def calibrate(self, shape, keep, outputs):
        """Algorithm 1: the attention joins the others that changes the entropy of the outputs least."""
        count = self.budget(shape, keep)
        order = self.scaled(shape.depth)[:count]
        whole = None if self.layers or not count else gaussian_entropy(outputs(()))
        while len(order) < count:
            rest = [layer for layer in range(shape.depth) if layer not in order]
            order.append(min(rest, key=lambda one: abs(whole - gaussian_entropy(outputs([*order, one])))))
        return {"order": torch.tensor(order, dtype=torch.int64), "scale": torch.tensor(1.0)}

    def skip_scale(self):
        """x <- x where the model is as it was, x <- 2x (`identity`) where it has learned that."""
        return 1.0 if self.state is None else self.state["scale"].item()

    def fit(self, shape, keep, seed):
        """The model itself learns, while what was chosen fades."""
        order = self.state["order"].tolist()[: self.budget(shape, keep)]
        if not order:
            raise UserError("--fit: nose removes nothing at this budget; give --keep below 1")
        return Dilution(self, shape, order)

    def neutral_state(self, shape, seed):
        """Blocks in their order."""
        return {"order": torch.arange(shape.depth - 1), "scale": torch.tensor(1.0)}
