"""Token-level correlation-guided compression keeps of a sub-image as many tokens as it has information; the rest merge.

A patch that many others resemble is redundant; the share of patches that are not is the sub-image's density of
information. So many tokens are sampled by the class token's attention, in a shallow block for local and in a deep one
for global information, and every other token joins the sampled one it resembles most.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

from tprune.core import alike, select
from tprune.core.budget import PROJECTOR, Stage, scale_layer
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class TokenCorr(TokenMethod):
    """Adaptive sampling and merging of every sub-image's tokens."""

    paper = Paper(
        title="Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding",
        venue="arXiv",
        year=2024,
        arxiv="2407.14439",
        code="JiuTian-VL/TokenCorrCompressor",
        checked="abstract",
        notes="The authors' repository holds no code, and the full text was not at hand. Ours: keys of the projected "
        "block, a patch redundant if a tenth of all reach a cosine of 0.8, half of the tokens sampled in block 5 of 24 "
        "and half in the projected one, means weighted by cosine, taken behind the projector.",
    )
    needs_cls = True
    reads = ("encoder",)
    positions = "compact"
    unit = "crop"
    under_keep = {"counts": "keep"}

    similar: float = param(0.8, "alpha: cosine of keys from which two patches are alike", low=-1, high=1)
    partners: float = param(
        0.1, "beta: a patch is redundant if this fraction of all is like it", low=0, high=1
    )
    shallow: int = param(5, "block whose attention samples local information, of 24", low=0)
    local: float = param(0.5, "fraction of the sampled tokens that is local", low=0, high=1)
    counts: str = param(
        "image", "who says how many stay: each sub-image, or --keep", choices=("image", "keep")
    )

    def encoder_blocks(self, depth):
        """The shallow block."""
        return (scale_layer(self.shallow, 24, depth),)

    def stages(self, shape, knob):
        """As many as the sub-image has information for, at least one; with a budget ceil(r · N)."""
        self.check_budget(knob)
        return [Stage(PROJECTOR, max(1, ceil((1.0 if knob is None else knob) * shape.tokens)))]

    def reduce(self, site, view, count, memory):
        """Density, sample, merge."""
        tower = view.encoder
        key = tower.attention.key.transpose(1, 2).flatten(2)[:, tower.prefix :]
        keys = view.pool(key)
        if self.varies():
            crowded = alike.crowded(keys, view.prunable, self.similar, self.partners)
            count = (view.prunable & ~crowded).sum(1).clamp_min(1).cpu()
        index, valid = select.keep_prunable_top(self.sampled(view, count).float(), count, view.prunable)
        return alike.join_nearest(keys, index, valid, view.prunable)

    def sampled(self, view, count):
        """The best by shallow attention, and of the others the best by deep attention: bool [B, N]."""
        [block] = self.encoder_blocks(view.encoder.depth)
        shallow = view.pool(view.encoders[block].saliency())
        deep = view.pool(view.encoder.saliency())
        total = torch.as_tensor(count, device=deep.device).expand(len(deep))
        few = (total * self.local).round().long()
        local = select.best_of(shallow, view.prunable, few)
        return local | select.best_of(deep, view.prunable & ~local, total - few)
