"""BAViT puts a small ViT in front of a detector that tells foreground from background, and drops the background.

It sees the pixels and names every patch by itself; the detector's encoder receives what is left, at its own positions,
beside its class token and its queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.func import functional_call

from tprune.core import select
from tprune.core.budget import Site, Stage
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod
from tprune.methods.vit._bavit_fit import Foreground, skeleton


@dataclass(frozen=True)
class BAViT(TokenMethod):
    """Before block 0: complete pruning of what is likelier background, or partial pruning of as many as --keep says."""

    paper = Paper(
        title="Token Pruning using a Lightweight Background Aware Vision Transformer",
        venue="NeurIPS FITML workshop",
        year=2024,
        arxiv="2410.09324",
        checked="abstract",
        notes="From the abstract and the claims of the authors' patent application (US 2026/0087793: no class token, a "
        "linear layer with two outputs per token, cross-entropy summed over all tokens); widths are ViT-S's, schedule "
        "and initial values are ours. The detector is not fine-tuned. None is built in: no quality is claimed.",
    )
    kind = "trained"
    needs_image = True
    reads = ()
    native = ("threshold",)
    under_keep: ClassVar[dict[str, Any]] = {"threshold": None}
    learns = "required"
    labels = "patches"
    built_in: ClassVar[dict[str, Any]] = {"epochs": 1.0, "width": 96, "heads": 3}

    threshold: float | None = param(
        0.5,
        "keep what is foreground with at least this probability; none: as many as --keep says",
        low=0,
        high=1,
    )
    blocks: int = param(2, "of the small ViT", low=1)
    width: int = param(384, "of its tokens", low=1)
    heads: int = param(6, "of its attention", low=1)
    overlap: float = param(
        0.5, "part of a patch that objects must cover to make it foreground", low=0, high=1
    )
    epochs: float = param(30.0, "of a fit", low=0)
    batch: int = param(16, "images per step of a fit", low=1)
    lr: float = param(5e-4, "of a fit, at its peak", low=0)
    warmup: float = param(0.1, "fraction of the steps", low=0, high=1)
    weight_decay: float = param(0.05, "of a fit", low=0)

    def check(self, shape):
        """The small ViT can be built, and there are pixels for it."""
        super().check(shape)
        if self.width % self.heads:
            raise UserError(f"--set width={self.width}: expected a multiple of heads, {self.heads}")

    def stages(self, shape, knob):
        """Once, before the detector's encoder."""
        self.check_budget(knob)
        return [Stage(Site(0), shape.tokens if knob is None else max(1, round(knob * shape.tokens)))]

    def reduce(self, site, view, count, memory):
        """What is foreground stays, in its order."""
        length = view.hidden.shape[1]
        learned = self.state["position"].shape[1]
        if learned != length - view.prefix:
            raise UserError(
                f"the images have {length - view.prefix} patches, and bavit was fitted on {learned}; use images of the "
                "size it was fitted on"
            )
        likely = self.foreground(view.signal("pixels"))
        if not self.varies():
            return Reduction.keep(select.keep_prefix_and_top(likely, count, view.prefix), length)
        stays = view.prunable.new_ones(view.hidden.shape[:2])
        stays[:, view.prefix :] = likely >= self.threshold
        index, valid = select.keep_where(stays)
        return Reduction.keep(index, length, valid)

    def foreground(self, pixels):
        """How likely every patch of `pixels` [B, C, H, W] shows an object, float32 [B, N]."""
        state = dict(self.state)
        weight, position = state["embed.weight"], state["position"]
        blocks = sum(name.endswith("qkv.weight") for name in state)
        small = skeleton(position.shape[1], tuple(weight.shape[1:]), weight.shape[0], self.heads, blocks)
        return functional_call(small, state, (pixels.to(weight.dtype),)).softmax(-1)[..., 1]

    def fit(self, shape, keep, seed):
        """The small ViT; the budget plays no part."""
        return Foreground(self, shape, seed)
