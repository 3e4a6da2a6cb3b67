"""Pruning All-Rounder has a router look at a prompt and say which image tokens it needs, and which layers.

The router is a small decoder beside the large one. What it says comes true at once: the other image tokens leave after
two layers, the other layers are passed by, while the prompt is read and while it is answered. It learns from its own
choices, made differently by noise: those with which the model answers as it does in full are to be likelier.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core import select
from tprune.core.budget import Site, Stage, knob_at, scale_layer
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod
from tprune.methods.vlm._par_fit import Preferring
from tprune.methods.vlm._router import empty


@dataclass(frozen=True)
class PAR(TokenMethod):
    """The int(V (1 - r)) image tokens and int(L (1 - s)) layers with the largest logits stay."""

    kind = "trained"
    learns = "required"
    paper = Paper(
        title="Pruning All-Rounder: Rethinking and Improving Inference Efficiency for Large Vision Language Models",
        venue="ICCV",
        year=2025,
        arxiv="2412.06458",
        code="ASGO-MM/Pruning-All-Rounder",
        checked="code",
        notes="Training is not public. Known are the noise on the router's attention, the preference between flows by "
        "how well the answer is kept, and that few tokens and layers are rewarded; the flows per step, the loss "
        "(contrastive preference, without a reference), its weights and both fractions are ours. The authors hide "
        "tokens and discard what passed layers computed; here tokens leave, and layers that all rows pass do not run. "
        "--keep scales both fractions alike and lets no layer be passed by before tokens leave, so that it fixes what "
        "enters (ours).",
    )
    reads = ()
    routes = True
    under_keep = {"among": "later"}
    built_in = {"epochs": 1.0, "batch": 16, "lr": 1e-3}

    tokens: float = param(0.5, "r: fraction of the image tokens that leaves", low=0, high=1)
    layers: float = param(0.125, "s: fraction of the layers that are passed by", low=0, high=1)
    among: str = param(
        "all",
        "which layers may be passed by: all, or later ones than tokens leave at",
        choices=("all", "later"),
    )
    layer: int = param(2, "image tokens leave before this layer, of 32", low=1)
    depth: int = param(2, "layers of the router", low=1)
    inner: float = param(2.6875, "width of its MLPs, in widths of the model", low=0)
    flows: int = param(4, "fit: choices that compete at every step", low=2)
    strength: float = param(10.0, "fit: β, of the preference", low=0)
    sparsity: float = param(0.01, "fit: weight of the mean probability of staying", low=0)
    epochs: float = param(1.0, "fit: passes over the training questions", low=0)
    batch: int = param(32, "fit: questions per step", low=1)
    lr: float = param(1e-4, "fit: peak learning rate", low=0)

    def stages(self, shape, knob):
        """A look before the first layer, tokens after two, and layers passed by: the plan counts the deepest ones."""
        tokens, layers = self.tokens, self.layers
        if knob is not None:
            most = max(tokens, layers)
            tokens, layers = ((1 - knob) * rate / most if most else 1 - knob for rate in (tokens, layers))
        count = max(1, select.floor_count(shape.tokens, 1 - tokens))
        left = max(1, select.floor_count(shape.depth, 1 - layers))
        leave = Site(max(1, scale_layer(self.layer, 32, shape.depth)))
        left = max(left, leave.layer if self.among == "later" else 1)
        passed = [Site(place, between) for place in range(left, shape.depth) for between in (False, True)]
        counts = {site: count if site >= leave else shape.tokens for site in passed}
        return [
            Stage(Site(0), shape.tokens),
            Stage(leave, count),
            *(Stage(site, count, skips=True) for site, count in counts.items()),
        ]

    def reduce(self, site, view, count, memory):
        """The router looks before the first layer; what it said of the tokens is done where they leave."""
        if site.layer:
            score = memory["tokens"].gather(1, view.position)
            index, valid = select.keep_prunable_top(score, count, view.prunable)
            return Reduction.keep(index, view.hidden.shape[1], valid)
        memory["tokens"], layers = self.router()(view.hidden, view.real)
        memory["passes"] = self.passes(layers, memory["passed"])
        return None

    def passes(self, logits, count):
        """Which layers every row passes by, the `count` (int64 [B]) with the lowest `logits` [B, L]: bool [B, L]."""
        if self.among == "later":
            first = max(1, scale_layer(self.layer, 32, logits.shape[1]))
            logits = logits.clone().index_fill_(1, torch.arange(first, device=logits.device), torch.inf)
        rank = logits.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return rank >= logits.shape[1] - count.to(logits.device)[:, None]

    def router(self):
        """As it was learned."""
        depth, width = self.state["tokens"].shape
        inner = self.state["layers.0.gate.weight"].shape[0]
        heads = width // (2 * len(self.state["speed"]))
        layers = len({name.split(".")[1] for name in self.state if name.startswith("layers.")})
        made = empty(layers, width, heads, inner, depth)
        made.load_state_dict(self.state, assign=True)
        return made

    def fit(self, shape, keep, seed):
        """The router, to the fractions of the budget.

        Raises:
            UserError: a model whose width its heads do not share evenly, in pairs.
        """
        if shape.width % (2 * shape.heads):
            raise UserError(
                f"{self.id}: the router's {shape.heads} heads need an even share each of a width of {shape.width}; "
                "use another model"
            )
        method = self if keep is None else self.counted()
        knob = knob_at(keep, lambda one: method.stages(shape, one), shape.tokens, shape.depth)
        return Preferring(method, shape, method.stages(shape, knob), seed)
