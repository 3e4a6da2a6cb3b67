"""VLA-Pruner: a robot's policy looks at one thing while it reads and at another while it acts, so both have a say.

Tokens that the prompt attends to and tokens that recent actions attended to are joined; of these, the most different
ones stay. The history of an episode is kept from one control step to the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core import match, ranks, select
from tprune.core.budget import Site, Stage, scale_layer
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class VLAPruner(TokenMethod):
    """Before layer K: top m by the prompt's attention, top m by past actions', then max-min diversity down to m."""

    paper = Paper(
        title="VLA-Pruner: Temporal-Aware Dual-Level Visual Token Pruning for Efficient Vision-Language-Action "
        "Inference",
        venue="arXiv",
        year=2025,
        arxiv="2511.16449",
        code="MINT-SJTU/VLA-Pruner",
        checked="code",
        notes="The authors' code weighs the oldest step of the history most, the paper the newest (weights=paper). All "
        "tokens generated behind a prompt are its action. Another number of prompts or image tokens begins a new "
        "episode, as reset() of the handle does. With --keep nothing is left unpruned while the history fills "
        "(warm_up=false): the prompt's attention then decides alone.",
    )
    reads = ("attention", "embeddings")
    native = ("reduction",)
    under_keep = {"warm_up": False}

    layer: int = param(3, "K: image tokens leave before this layer, of 32", low=1)
    reduction: float = param(0.5, "r: fraction of the image tokens that leaves", low=0, high=1)
    watched: int = param(15, "the layer whose attention from action tokens is kept, of 32", low=0)
    window: int = param(3, "w: how many control steps the history has", low=1)
    decay: float = param(0.8, "γ: weights of the history's steps are its powers", low=0, high=1)
    weights: str = param(
        "code", "which step weighs most: code, the oldest; paper, the newest", choices=("code", "paper")
    )
    rows: str = param(
        "prefill", "who rates in the prompt: all its tokens, or the last", choices=("prefill", "last")
    )
    warm_up: bool = param(True, "whether nothing leaves until the history is full")

    def stages(self, shape, knob):
        """m = round((1 - r) · V)."""
        keep = 1 - self.reduction if knob is None else knob
        layer = max(1, scale_layer(self.layer, 32, shape.depth))
        if scale_layer(self.watched, 32, shape.depth) < layer:
            raise UserError(
                f"vla-pruner: layer {self.watched} is watched, and tokens leave only before {self.layer}"
            )
        return [Stage(Site(layer), max(1, round(keep * shape.tokens)))]

    def watches(self, depth):
        """One layer."""
        return (scale_layer(self.watched, 32, depth),)

    def watch(self, layer, attention, last, image, total, memory):
        """What the latest token paid to each image token, mean over heads; those that are gone got nothing."""
        paid = attention.rows(last).mean(1)[:, 0]  # [B, T]
        found = torch.zeros(len(paid), total, device=paid.device)
        memory.setdefault("answer", []).append(found.scatter_add(1, image.clamp_min(0), paid * (image >= 0)))

    def reduce(self, site, view, count, memory):
        """U = top m of the prompt's and of the actions' attention; m of U by max-min cosine distance."""
        acted = self.history(memory["episode"], view)
        if acted is None and self.warm_up:
            return None
        attention = view.attention
        score = (
            attention.rows(view.last)[:, :, 0]
            if self.rows == "last"
            else attention.column_sums(counted=view.real)
        )
        score = score.mean(1)  # [B, N]
        if acted is None:
            index, valid = select.keep_prunable_top(score, count, view.prunable)
        else:
            index, valid = select.keep_first(self.diverse(view, score, acted, count), count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def diverse(self, view, score, acted, count):
        """The tokens picked from the union of both levels, in turn: [B, m]."""
        left = torch.as_tensor(count, device=score.device).expand(len(score)).unsqueeze(1)
        levels = (ranks.rank(part.masked_fill(~view.prunable, -torch.inf)) < left for part in (score, acted))
        union = torch.stack(list(levels)).any(0) & view.prunable
        return match.farthest_first(view.signal("embeddings"), int(left.max()), union)

    def history(self, episode, view):
        """The last steps' attention to the image, weighted, at the tokens' places [B, N]; None until it is full."""
        past = episode.setdefault("history", [])
        if episode.get("answer"):
            past.append(torch.stack(episode["answer"]).mean(0))
        episode["answer"] = []
        shape = len(view.hidden), int(view.prunable.sum(1).max())
        if past and past[-1].shape != shape:
            past.clear()
        del past[: -self.window]
        if len(past) < self.window:
            return None
        # From the oldest to the newest.
        powers = torch.tensor([self.decay**step for step in range(self.window)]).to(past[0])
        powers = powers if self.weights == "code" else powers.flip(0)
        total = (torch.stack(past) * powers[:, None, None]).sum(0)
        number = torch.where(view.prunable, view.prunable.cumsum(1) - 1, 0)
        return total.gather(1, number)
