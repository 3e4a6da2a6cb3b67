"""Index-preserving pruning drops the background of documents before the vision tower, and every token keeps its place.

A small classifier looks at the pixels of one token and says whether there is anything; what is next to something stays
too. The tower then works on what is left, rows, columns and windows as in the whole image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from tprune.core import grid, select
from tprune.core.budget import PROJECTOR, Stage
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.fit import Fit, Plan
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class IndexPreserving(TokenMethod):
    """Tokens with something in them, or in one of the eight around them, stay; at least one."""

    kind = "trained"
    learns = "required"
    labels = "foreground"
    paper = Paper(
        title="Index-Preserving Lightweight Token Pruning for Efficient Document Understanding in Vision-Language "
        "Models",
        venue="arXiv",
        year=2025,
        arxiv="2509.06415",
        code="jaeminSon/index-preserving-lightweight-token-pruning",
        checked="code",
        notes="Where all patches see each other the authors' seams count the first patch of a second image to the "
        "first; ours do not. Towers that see images as a batch run in full, and tokens leave behind them. The authors "
        "draw as much background as foreground, here both weigh the same; their augmentation (dropout, blur, noise, "
        "JPEG) is left out. --keep fixes the counts, the largest logits stay (ours).",
    )
    reads = ()
    positions = "closed"
    unit = "crop"
    before_tower = True
    under_keep = {"counts": "keep"}
    built_in = {"epochs": 1.0, "batch": 16, "lr": 1e-3}

    threshold: float = param(0.0, "of the logit above which there is something")
    reach: int = param(1, "rows and columns around it that stay too", low=0)
    counts: str = param("image", "who says how many stay: each image, or --keep", choices=("image", "keep"))
    features: int = param(256, "of the classifier", low=1)
    epochs: float = param(1000.0, "fit: passes over the training images", low=0)
    batch: int = param(256, "fit: images per step (the authors: single tokens)", low=1)
    lr: float = param(1e-4, "fit: learning rate", low=0)

    def stages(self, shape, knob):
        """Any number; with --keep round(r · V), at least one."""
        self.check_budget(knob)
        return [Stage(PROJECTOR, max(1, round((1.0 if knob is None else knob) * shape.tokens)))]

    def reduce(self, site, view, count, memory):
        """The best logit in the neighbourhood decides; tokens that form no grid have no neighbours."""
        logit = classified(view.signal("pixels").float(), self.state)
        if view.grid is not None:
            logit = grid.best_near(logit, view.grid, self.reach)
        if not self.varies():
            index, valid = select.keep_prunable_top(logit, count, view.prunable)
        else:
            stays = select.above(logit, view.prunable, self.threshold)
            index, valid = select.keep_where(stays | ~view.prunable)
        return Reduction.keep(index, view.prunable.shape[1], valid)

    def fit(self, shape, keep, seed):
        """The classifier, whatever the budget.

        Raises:
            UserError: a model whose tokens are not of one size in pixels.
        """
        if not all(shape.patch):
            raise UserError(
                f"{self.id} reads the pixels of a token, and their number cannot be told in this model"
            )
        return Foreground(self, shape, seed)


def classified(pixels, state):
    """Whether there is something, a logit per token: [B, N].

    Args:
        pixels: [B, N, C, H, W].
        state: norm, conv and fc, as the authors name them; a convolution whose kernel is the whole token.
    """
    normal = functional.layer_norm(pixels, pixels.shape[2:], state["norm.weight"], state["norm.bias"])
    inner = functional.linear(normal.flatten(2), state["conv.weight"].flatten(1), state["conv.bias"])
    return functional.linear(functional.gelu(inner), state["fc.weight"], state["fc.bias"])[..., 0]


class Foreground(Fit):
    """Which tokens the boxes touch, foreground and background at equal weight; nothing leaves."""

    answers = False
    sites = (PROJECTOR,)

    def __init__(self, method, shape, seed):
        super().__init__(shape)
        self.plan = Plan(method.epochs, method.batch, method.lr)
        generator = torch.Generator().manual_seed(seed)
        width = math.prod(shape.patch)
        parts = {
            "norm.weight": torch.ones(shape.patch),
            "norm.bias": torch.zeros(shape.patch),
            "conv.weight": uniform((method.features, *shape.patch), width, generator),
            "conv.bias": uniform((method.features,), width, generator),
            "fc.weight": uniform((1, method.features), method.features, generator),
            "fc.bias": uniform((1,), method.features, generator),
        }
        self.parts = nn.ParameterDict({name.replace(".", "_"): part for name, part in parts.items()})
        self.names = {name: name.replace(".", "_") for name in parts}

    def at(self, site, view, memory):
        """A logit per token, and which image it is of."""
        if view.grid is None:
            raise UserError(
                "index-preserving is fitted on images of one crop each; use a model without crops"
            )
        state = {name: self.parts[own] for name, own in self.names.items()}
        logit = classified(view.signal("pixels").float(), state)
        memory.setdefault("seen", []).append((view.signal("rows"), view.grid, logit))
        return Reduction.identity(*logit.shape, logit.device)

    def losses(self, outputs, labels, memory, dense):
        """Cross-entropy, the mean of what it is in the foreground and in the background."""
        logits, wanted = [], []
        for rows, size, logit in memory["seen"]:
            place = torch.arange(logit.shape[1], device=logit.device)
            cells = torch.stack([place // size[1], place % size[1]], 1).expand(len(rows), -1, -1)
            sizes = torch.tensor(size, device=logit.device).expand(len(rows), 2)
            boxes = memory["inputs"]["boxes"][rows.to(logit.device)]
            wanted.append(grid.covered(cells, sizes, boxes).flatten())
            logits.append(logit.flatten())
        logit, wanted = torch.cat(logits), torch.cat(wanted)
        entropy = functional.binary_cross_entropy_with_logits(logit, wanted.float(), reduction="none")
        sides = [(entropy * side).sum() / side.sum().clamp_min(1) for side in (wanted, ~wanted)]
        return {"foreground": sum(sides) / 2}

    def state(self):
        """The classifier."""
        return {name: self.parts[own].detach().clone() for name, own in self.names.items()}


def uniform(shape, inputs, generator):
    """Initial weights as PyTorch draws them for so many inputs."""
    return (2 * torch.rand(shape, generator=generator) - 1) * inputs**-0.5
