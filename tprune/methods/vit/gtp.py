"""GTP hands what a token knows to its neighbours before it leaves: a few tokens in every block, along a graph.

The graph joins patches that are next to each other and patches whose embeddings are alike; it is drawn once per
image. Attention is made sparse, which sharpens the score by which tokens are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core import select, threshold
from tprune.core.budget import Site, Stage, even_stages
from tprune.core.graph import neighbours_on_grid, normalised, similar_neighbours
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod

GRAPHS = ("mixed", "spatial", "semantic")
SCORES = ("mixed", "sum", "received", "diagonal", "cls")


@dataclass(frozen=True)
class GTP(TokenMethod):
    """Graph-based token propagation between attention and MLP of every block."""

    paper = Paper(
        title="GTP-ViT: Efficient Vision Transformers via Graph-based Token Propagation",
        venue="WACV",
        year=2024,
        arxiv="2311.03035",
        code="Ackesnal/GTP-ViT",
        checked="code",
        notes="Defaults are the authors' for P = 8 on DeiT-B; they search theta and alpha anew for every P. A block "
        "that no token leaves keeps its attention. Without a class token the semantic graph has as many neighbours as "
        "with one; the authors' then has one more. Where the first blocks attend to plain ground, as digits-vit's do, "
        "the authors' score drops what matters first and falls below random; --set score=cls does not.",
    )
    native = ("p",)

    p: int = param(8, "tokens that leave every block", low=0)
    theta: float = param(0.6, "fraction of a head's attention map that is kept; 1: all", low=0, high=1)
    alpha: float = param(0.1, "how much of a leaving token its neighbours take over; 0: it is dropped", low=0)
    neighbours: int = param(8, "similar patches that each patch is joined to", low=1)
    graph: str = param("mixed", "which patches are joined", choices=GRAPHS)
    score: str = param(
        "mixed", "what is ranked: attention to itself and received, or one of them", choices=SCORES
    )
    heads: str = param("max", "how heads become one", choices=("max", "mean"))
    token_scale: bool = param(True, "proportional attention, by what a token took over")

    def check(self, shape):
        """The grid must be known, and for one score a class token."""
        super().check(shape)
        if self.graph != "semantic" and shape.grid is None:
            raise UserError(
                "gtp draws a graph on the image's grid, which is not known here; --set graph=semantic"
            )
        if self.score == "cls" and not shape.has_cls:
            raise UserError(
                "--set score=cls: this model has no class token; use mixed, sum, received or diagonal"
            )

    def weighs_by_size(self):
        """Token scales are sizes that follow the same map as the tokens."""
        return self.token_scale

    def edits_attention(self):
        """Where tokens leave, the block uses the sparse map."""
        return self.theta < 1

    def edit_attention(self, attention):
        """The largest entries of every head's map [B, H, N, N], the others 0, not normalised again."""
        return threshold.keep_largest(attention, self.theta)

    def stages(self, shape, knob):
        """The graph is drawn before block 0; then p tokens leave every block."""
        rate = self.p if knob is None else (1 - knob) * shape.tokens
        return [Stage(Site(0), shape.tokens), *even_stages(rate, shape.tokens, shape.depth)]

    def reduce(self, site, view, count, memory):
        """The lowest ranks leave, and what they held is spread over their neighbours."""
        batch, length = view.hidden.shape[:2]
        prefix = view.prefix
        if not site.between:
            memory["graph"] = self.draw(view.hidden[:, prefix:], view.grid)
        if count >= length - prefix:
            return Reduction.identity(batch, length, view.hidden.device)
        order = select.top_ranked(self.rank(view.attention.rows(), prefix), length - prefix) + prefix
        kept, leaving = order[:, :count], order[:, count:]
        place = (view.position - prefix).gather(1, order)
        # The graph's columns are the tokens that hand over, its rows those that receive.
        edges = memory["graph"].transpose(1, 2)
        edges = edges.gather(1, place[:, count:, None].expand(-1, -1, edges.shape[2]))
        edges = edges.gather(2, place[:, None, :count].expand(-1, edges.shape[1], -1)).transpose(1, 2)
        weight = torch.cat([edges.new_zeros(batch, prefix, edges.shape[2]), self.alpha * edges], dim=1)
        return Reduction.spread(select.with_prefix(kept, prefix), length, leaving, weight, view.size)

    def draw(self, embedding, grid):
        """The normalised graph [B, n, n] of the patch embeddings [B, n, D]."""
        graph = torch.zeros((), dtype=torch.bool, device=embedding.device)
        if self.graph != "spatial":
            graph = similar_neighbours(embedding, self.neighbours)
        if self.graph != "semantic":
            graph = graph | neighbours_on_grid(*grid, device=embedding.device)
        return normalised(graph.expand(embedding.shape[0], -1, -1))

    def rank(self, attention, prefix):
        """Scores [B, n] of the patches from the block's map [B, H, N, N]; prefix tokens vote too."""
        join = torch.Tensor.amax if self.heads == "max" else torch.Tensor.mean
        if self.score == "cls":
            return join(attention[:, :, 0, prefix:], 1)
        itself = join(attention.diagonal(dim1=2, dim2=3)[:, :, prefix:], 1)
        received = join(attention.sum(2)[:, :, prefix:], 1)
        scores = {"received": received, "diagonal": itself, "sum": itself + received}
        return scores.get(self.score, itself * received)
