"""GlimpsePrune lets a token of its own glance at the prompt, and keeps the image tokens that it will take to answer.

The token stands behind the prompt and runs through the layers up to the one behind which image tokens leave; what it
attends to there, and what the tower made of the patches, goes through a small predictor. Both learn from where in the
image the answer is, the token also from saying the answer itself; the model stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from tprune.core import grid, select
from tprune.core.budget import Site, Stage, scale_layer
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.fit import Fit, Plan
from tprune.methods.tokens import TokenMethod
from tprune.methods.vlm._glimpse import Glimpse


@dataclass(frozen=True)
class GlimpsePrune(TokenMethod):
    """Behind layer R, the image tokens with sigmoid(logit) > 1/2 stay, at least one."""

    kind = "trained"
    learns = "required"
    labels = "boxes"
    paper = Paper(
        title="A Glimpse to Compress: Dynamic Visual Token Pruning for Large Vision-Language Models",
        venue="arXiv",
        year=2025,
        arxiv="2508.01548",
        code="HVision-NKU/GlimpsePrune",
        checked="code",
        notes="Without GlimpsePrune+ (LoRA and reinforcement learning) and forced corners. Defaults are LLaVA-1.5's; "
        "Qwen2.5-VL's are scores=logits, layer 18 of 28 and blocks 31, 23, 15 and 7 of 32. Several crops of an image "
        "are predicted each by itself (ours). --keep fixes the counts, the largest logits stay (ours); layers up to R "
        "see all tokens, so that it cannot go below their share.",
    )
    reads = ("beside", "encoder")
    under_keep = {"counts": "keep"}
    built_in = {"epochs": 2.0, "batch": 16, "lr": 1e-3}

    layer: int = param(21, "R: image tokens leave behind this layer, of 32, where the token looks", low=0)
    blocks: tuple[int, ...] = param((22, 16, 10, 4), "of the tower, of 24, that the predictor reads", low=0)
    scores: str = param(
        "log-probabilities", "what it reads of the token's attention", choices=("log-probabilities", "logits")
    )
    threshold: float = param(0.5, "of the probability above which a token stays", low=0, high=1)
    cap: float | None = param(None, "the largest fraction that stays", low=0, high=1)
    least: int = param(1, "how many stay at least", low=1)
    counts: str = param("image", "who says how many stay: each prompt, or --keep", choices=("image", "keep"))
    caches: str = param(
        "all", "which caches lose what leaves: all, or later layers'", choices=("all", "later")
    )
    width: int = param(256, "of the predictor", low=1)
    condition: int = param(512, "width of what it takes of the tower", low=1)
    heads: int = param(4, "of its attention", low=1)
    dice: float = param(1.0, "fit: weight of the Dice loss", low=0)
    entropy: float = param(0.1, "fit: weight of the cross-entropy per token", low=0)
    answers: float = param(1.0, "fit: weight of what the token says", low=0)
    epochs: float = param(1.0, "fit: passes over the training questions", low=0)
    batch: int = param(8, "fit: questions per step", low=1)
    lr: float = param(1e-4, "fit: peak learning rate", low=0)

    def encoder_blocks(self, depth):
        """In the order of the predictor's own."""
        return tuple(scale_layer(block, 24, depth) for block in self.blocks)

    def uniform(self):
        """All layers' caches hold what is left."""
        return self.caches == "all"

    def stages(self, shape, knob):
        """Any number behind layer R; with --keep round(r · V), at least one."""
        self.check_budget(knob)
        site = Site(min(scale_layer(self.layer, 32, shape.depth) + 1, shape.depth - 1))
        return [Stage(site, max(1, round((1.0 if knob is None else knob) * shape.tokens)))]

    def reduce(self, site, view, count, memory):
        """Who the predictor is surest of, or sure enough."""
        module = self.learned()
        attention = view.signal("beside").look(module.added()[: site.layer])
        logit = module.asked(view, attention, self.scores == "log-probabilities")
        if not self.varies():
            index, valid = select.keep_prunable_top(logit, count, view.prunable)
        else:
            index, valid = select.keep_where(self.sure(logit.sigmoid(), view.prunable) | ~view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def sure(self, probability, image):
        """Which of the image tokens, bool [B, N], stay: those above the threshold, within `cap` and `least`."""
        most = None if self.cap is None else (image.sum(1) * self.cap).long()
        return select.above(probability, image, self.threshold, self.least, most)

    def learned(self):
        """The token and the predictor as they were learned."""
        depth, width = self.state["token"].shape
        heads, tower = (self.state[f"{name}.weight"].shape[1] for name in ("enter", "conditions.0"))
        made = self.empty(depth, width, heads, tower)
        made.load_state_dict(self.state, assign=True)
        return made

    def empty(self, depth, width, heads, tower):
        """Both without values, for a model of this depth, width, attention heads and width of the tower."""
        with torch.device("meta"):
            return Glimpse(
                depth, width, heads, tower, self.width, self.condition, len(self.blocks), self.heads
            )

    def fit(self, shape, keep, seed):
        """Both, whatever the budget."""
        if (self.width + self.condition) % (4 * self.heads) or self.width % self.heads:
            raise UserError(
                f"{self.id}: --set width={self.width} condition={self.condition} heads={self.heads}: the width must "
                "be a multiple of the heads, and both widths together of four times the heads"
            )
        return Answering(self, shape, seed)


class Answering(Fit):
    """The token learns to say the answer, and the predictor where in the image it is."""

    def __init__(self, method, shape, seed):
        super().__init__(shape)
        self.method = method
        self.sites = tuple(stage.site for stage in method.stages(shape, 1.0))
        self.plan = Plan(method.epochs, method.batch, method.lr, warmup=0.1)
        glimpse = method.empty(shape.depth, shape.width, shape.heads, shape.tower)
        self.glimpse = glimpse.to_empty(device="cpu").begin(torch.Generator().manual_seed(seed))

    def at(self, site, view, memory):
        """Nothing leaves while it learns."""
        memory["view"] = view
        return Reduction.identity(*view.prunable.shape, view.prunable.device)

    def losses(self, outputs, labels, memory, dense):
        """Dice and cross-entropy of what is kept, and the cross-entropy of the answers."""
        view, inputs, method = memory["view"], memory["inputs"], self.method
        behind = view.signal("beside")
        attention, said = behind.tell(self.glimpse.added(), self.sites[0].layer - 1, inputs["answers"])
        logit = self.glimpse.asked(view, attention, method.scores == "log-probabilities")
        wanted, image = self.wanted(view, inputs["boxes"]), view.prunable
        number = image.sum(1)
        likely = logit.sigmoid() * image
        overlap = 2 * (likely * wanted).sum(1) + 1e-6
        dice = 1 - overlap / (likely.sum(1) + wanted.sum(1) + 1e-6)
        entropy = functional.binary_cross_entropy_with_logits(logit, wanted, reduction="none")
        entropy = (entropy * image).sum(1) / number
        return {
            "dice": method.dice * dice.mean(),
            "entropy": method.entropy * entropy.mean(),
            "answers": method.answers * functional.cross_entropy(said, labels),
        }

    def wanted(self, view, boxes):
        """Which image tokens lie in the boxes, float32 [B, N]."""
        cells = view.signal("cells")
        crop = cells[..., 0]
        if bool(((crop != crop.amax(1, keepdim=True)) & view.prunable).any()):
            raise UserError(
                f"{self.method.id} is fitted on images of one crop each; use a model without crops"
            )
        size = cells[..., 1:].amax(1) + 1
        return (grid.covered(cells[..., 1:], size, boxes) & view.prunable).float()

    def state(self):
        """The token and the predictor."""
        return {name: tensor.detach().clone() for name, tensor in self.glimpse.state_dict().items()}
