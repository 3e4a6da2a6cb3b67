"""L3Prune: a model that embeds texts ends early, where the loss of its embeddings is lowest before any training.

What is read behind a middle layer often tells texts apart better than what the last one makes of them to foretell the
next token. Of the losses behind every block the lowest in the deeper half costs hardly any quality, the lowest in the
shallower half leaves a small model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.core.contrast import POOLINGS, contrastive_loss, pooled
from tprune.core.weights import StructureEdit
from tprune.methods.base import Paper, param
from tprune.methods.llm_weights._depth import blocks_to_remove
from tprune.methods.weight_view import ModelView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class L3Prune(WeightMethod):
    """The first blocks, as many as the loss says, or a share of them with --sparsity."""

    paper = Paper(
        title="Large Language Models Are Overparameterized Text Encoders",
        venue="arXiv",
        year=2024,
        arxiv="2410.14578",
        code="thennal10/l3prune",
        checked="code",
        notes="Pruning alone: the contrastive training afterwards is left out, and so are the frames that chat models "
        "put around a text. A --sparsity is met as nearly as whole blocks allow, where the code rounds the blocks that "
        "stay down. Encoders, which the paper leaves out, are read by the mean of all tokens.",
    )
    kind = "calibrated"
    scope = "model"
    stats = ("contrast",)
    propagate = "dense"
    runs_on = ("plain", "encoder")
    patterns = False

    size: str = param(
        "large",
        "Without --sparsity, which half of the blocks the lowest loss is looked for in: large, the deeper; small, the "
        "shallower",
        choices=("large", "small"),
    )
    pooling: str = param(
        "weighted_mean",
        "What of its tokens embeds a text in a decoder; in an encoder it is the mean",
        choices=POOLINGS,
    )
    batch: int = param(64, "Triples among which a query must find its positive", low=2)
    scale: float = param(20.0, "Of the cosines that are logits", low=0)

    def varies(self) -> bool:
        """The losses decide, unless a sparsity is asked for."""
        return True

    def plan(self, model: ModelView, budget: WeightBudget) -> list[StructureEdit]:
        """Remove the blocks behind the last that stays."""
        depth = len(model.blocks)
        if budget.sparsity is None:
            kept = self.ends([block.contrast for block in model.blocks])
        else:
            kept = depth - blocks_to_remove(budget.sparsity, depth)
        return [StructureEdit(block.index, removed=True) for block in model.blocks[kept:]]

    def ends(self, losses: list[float]) -> int:
        """How many blocks stay, by the loss behind each."""
        middle = len(losses) // 2
        places = range(middle, len(losses)) if self.size == "large" else range(max(middle, 1))
        return min(places, key=losses.__getitem__) + 1

    def pool(self, hidden: Tensor, begin: Tensor, end: Tensor) -> Tensor:
        """Embeddings [B, D] of hidden states [B, L, D], by the tokens from `begin` to `end` [B]."""
        return pooled(hidden, begin, end, self.pooling)

    def contrast(self, embeddings: Tensor) -> Tensor:
        """The mean loss over batches of triples; the rest of a batch is left out, unless there is none before it.

        Args:
            embeddings: [3 N, D], of all queries, positives and negatives.
        """
        parts = embeddings.view(3, -1, embeddings.shape[1]).split(self.batch, dim=1)
        whole = [part for part in parts if part.shape[1] == self.batch] or parts[:1]
        return torch.stack([contrastive_loss(*part, self.scale) for part in whole]).mean()
