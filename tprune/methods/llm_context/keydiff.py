"""KeyDiff: entries whose keys point where most keys point can be done without.

A key's cosine with the mean direction of all keys of its head stands for how little it adds; distinct keys stay. No
attention is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.core.cache import Evict, Replace
from tprune.core.select import worst_between
from tprune.core.stored import Encode
from tprune.methods.base import Paper, param
from tprune.methods.cache import CacheMethod
from tprune.methods.cache_view import LayerView, StepView

SHORT = 1e-12
"""Keys are taken to be no shorter."""


@dataclass(frozen=True)
class KeyDiff(CacheMethod):
    """The entries stay that are least like the mean direction of their head's keys."""

    paper = Paper(
        title="KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in "
        "Resource-Constrained Environments",
        venue="arXiv",
        year=2025,
        arxiv="2504.15364",
        checked="port",
        notes="The authors' code is not public; as kvpress, all leaves at once behind the prompt. The paper lets a "
        "prompt in block by block, evicts behind each, and goes on with every token (decode=true).",
    )
    reads = ()

    decode: bool = param(False, "an entry leaves for every generated token too: the least distinct one")

    def start(self, layer: LayerView, count: int) -> Evict | Encode:
        """The `count` most distinct entries."""
        shrink = layer.state["shrink"] = _shrink(layer.key)
        return self.keep_best(layer, 1 + distinctness(layer.key, shrink), count)

    def step(self, view: StepView) -> Replace:
        """The least distinct entry leaves; the mean is that of what is there, fillers apart."""
        shrink = torch.cat([view.state["shrink"][..., :-1], _shrink(view.key[:, :, -1:])], -1)
        view.state["shrink"] = shrink
        if not isinstance(view.fillers, int) or view.fillers:
            place = torch.arange(shrink.shape[-1], device=shrink.device)
            begin = view.fillers if isinstance(view.fillers, int) else view.fillers[:, None, None]
            shrink = shrink.masked_fill(place < begin, 0)
        return Replace(worst_between(distinctness(view.key, shrink), view.position, view.fillers, 0))


def distinctness(key: Tensor, shrink: Tensor) -> Tensor:
    """Minus the cosine of keys [B, G, T, d] with the mean of their directions, float32 [B, G, T].

    Args:
        shrink: one over their lengths; 0 for those that do not count.
    """
    key = key.float()
    anchor = (shrink.unsqueeze(2) @ key).squeeze(2)  # [B, G, d]; its length says nothing
    anchor = torch.nn.functional.normalize(anchor, dim=-1)
    return -(key @ anchor.unsqueeze(3)).squeeze(3) * shrink


def _shrink(key: Tensor) -> Tensor:
    """One over every key's length, float32: [..., d] -> [...]."""
    return key.float().norm(dim=-1).clamp_min(SHORT).reciprocal()
