"""ATP-LLaVA lets every image and question decide how many image tokens go on, at a few layers of the decoder.

A token stays where what it attends to and what the words pay it exceed a threshold, or where it lies on a coarse grid
and that is worth more than another; a small module reads both thresholds off the mean scores of the prompt. While it
learns, tokens are weighed by how surely they pass; the model learns with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from tprune.core import score, select
from tprune.core.budget import staircase
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.fit import Fit, Plan, Relaxed
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class ATPLLaVA(TokenMethod):
    """Before layer K, a token stays with S_red > θ_r or S_spa > θ_s."""

    kind = "trained"
    learns = "required"
    paper = Paper(
        title="ATP-LLaVA: Adaptive Token Pruning for Large Vision Language Models",
        venue="CVPR",
        year=2025,
        arxiv="2412.00447",
        checked="abstract",
        notes="A reconstruction, its equations second-hand: no code is public. Scores are scaled to 0 to 1 in every "
        "prompt before they are averaged; the module's width, one rate of the grid for all layers and l as the number "
        "of a stage are ours. --keep fixes the counts, the largest margins over the thresholds stay.",
    )
    reads = ("attention",)
    under_keep = {"counts": "keep"}
    built_in = {"epochs": 1.0, "batch": 16, "lr": 1e-3, "model_lr": 1e-4}

    layers: tuple[int, ...] = param((5, 15, 25), "image tokens leave before these layers, of 32", low=1)
    rate: float = param(0.25, "R_s, fraction of the tokens on the coarse grid", low=1e-4, high=1)
    discount: float = param(3.0, "λ: a token on the grid is worth 1 - λ · R_s", low=0)
    width: int = param(64, "of the module", low=1)
    counts: str = param("image", "who says how many stay: each prompt, or --keep", choices=("image", "keep"))
    target: float = param(0.25, "fit without --keep: mean fraction of the image tokens", low=0, high=1)
    sharpness: float = param(10.0, "fit: T, of the mask", low=0)
    depth_penalty: float = param(0.05, "fit: weight of Σ l · kept_l", low=0)
    budget_penalty: float = param(0.2, "fit: weight of |mean kept - target|", low=0)
    tune: bool = param(True, "fit: the model's weights too, but for its tower")
    epochs: float = param(1.0, "fit: passes over the training questions", low=0)
    batch: int = param(128, "fit: questions per step", low=1)
    lr: float = param(2e-5, "fit: peak learning rate of the module", low=0)
    model_lr: float = param(2e-5, "fit: of the model", low=0)

    def stages(self, shape, knob):
        """Any number; with --keep, r^s after stage s."""
        self.check_budget(knob)
        ratio = 1.0 if knob is None else knob
        powers = range(1, len(self.layers) + 1)
        counts = [max(1, round(ratio**power * shape.tokens)) for power in powers]
        return staircase(self.layers, counts, 32, shape.depth)

    def reduce(self, site, view, count, memory):
        """Who passes a threshold, at least one; or the largest margins."""
        own = {
            name.split(".")[2]: part
            for name, part in self.state.items()
            if name.split(".")[1] == str(site.layer)
        }
        length, margin = view.hidden.shape[1], torch.stack(self.margins(view, own)).amax(0)
        if not self.varies():
            index, valid = select.keep_prunable_top(margin, count, view.prunable)
            return Reduction.keep(index, length, valid)
        stays = select.above(margin, view.prunable, 0)
        index, valid = select.keep_where(stays | ~view.prunable)
        return Reduction.keep(index, length, valid)

    def margins(self, view, own):
        """S_red - θ_r and S_spa - θ_s, each [B, N].

        Args:
            view: of the tokens.
            own: of the module: enter [2, W], redundant [W] and spatial [W], and their biases.
        """
        there, attention = view.prunable, view.attention
        share = there / there.sum(1, keepdim=True).clamp_min(1)
        # The mean logit over image keys is the logit of the mean key.
        key = (attention.key.float() * share[:, None, :, None]).sum(2, keepdim=True)
        key = key.repeat_interleave(attention.query.shape[1] // key.shape[1], dim=1)
        logits = (attention.query.float() * key).sum(3).mean(1) * attention.scale
        scores = torch.stack([score.min_max(logits, there), score.min_max(view.text_attention(), there)], 2)
        means = (scores * share.unsqueeze(2)).sum(1)  # [B, 2]
        z = means @ own["enter"] + own["enter_bias"]
        redundant = torch.sigmoid(z @ own["redundant"] + own["redundant_bias"]).unsqueeze(1)
        spatial = torch.sigmoid(z @ own["spatial"] + own["spatial_bias"]).unsqueeze(1)
        return scores.mean(2) - redundant, self.sampled(view) * (1 - self.discount * self.rate) - spatial

    def sampled(self, view):
        """Which tokens lie on the coarse grid, 0 or 1, float32 [B, N]."""
        cell, stride = view.signal("cells"), max(1, round(self.rate**-0.5))
        on = (cell[..., 1:] % stride == 0).all(-1) & (cell[..., 0] >= 0)
        return on.float()

    def fit(self, shape, keep, seed):
        """A module per stage, and the model."""
        return Thresholds(self, shape, keep, seed)


class Thresholds(Fit):
    """Masks that grow sharp: m = max(σ(T(S_red - θ_r)), σ(T(S_spa - θ_s)))."""

    epsilon = 0.0

    def __init__(self, method, shape, keep, seed):
        super().__init__(shape)
        self.method, self.target = method, method.target if keep is None else keep
        self.tunes = "language" if method.tune else "nothing"
        self.sites = tuple(stage.site for stage in method.stages(shape, 1.0))
        self.plan = Plan(method.epochs, method.batch, method.lr, warmup=0.03)
        generator = torch.Generator().manual_seed(seed)
        self.before = nn.ModuleDict({str(site.layer): self.module(generator) for site in self.sites})

    def module(self, generator):
        """z = W [mean S_self, mean S_cross] + b, and a threshold of each kind from it."""
        width = self.method.width
        drawn = {"enter": torch.randn(2, width, generator=generator) * 2**-0.5}
        for name in ("redundant", "spatial"):
            drawn[name] = torch.randn(width, generator=generator) * width**-0.5
            drawn[f"{name}_bias"] = torch.zeros(())
        drawn["enter_bias"] = torch.zeros(width)
        return nn.ParameterDict(drawn)

    def groups(self, model):
        """The modules, and the model at a rate of its own."""
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        tuned = [{"params": learning, "lr": self.method.model_lr}] if learning else []
        return [{"params": list(self.parameters())}, *tuned]

    def at(self, site, view, memory):
        """How surely each token passes; who passed less before is weighed less here."""
        margins = torch.stack(self.method.margins(view, self.before[str(site.layer)]))
        mask = torch.sigmoid(self.method.sharpness * margins).amax(0)
        mask = torch.where(view.prunable, mask, 1.0)
        return Relaxed(view.hidden, mask if view.present is None else view.present * mask)

    def losses(self, outputs, labels, memory, dense):
        """The answers, less in deep layers, and the target."""
        deep = sum(number * left.count for number, left in enumerate(memory["left"], start=1))
        return {
            "answers": functional.cross_entropy(outputs, labels),
            "depth": self.method.depth_penalty * deep,
            "budget": self.method.budget_penalty * (self.kept(memory) - self.target).abs(),
        }

    def state(self):
        """The modules."""
        return {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}
