"""Dynamic context pruning: every token says which of the earlier ones it and all after it can do without.

A small query and key per token and layer decide, for all heads at once. While this is learned a token fades, by a
sigmoid that becomes a step; afterwards it leaves the layer's cache, and its slot is free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core.cache import Evict, Replace
from tprune.core.dropping import interaction, lasting
from tprune.core.select import top, worst_between
from tprune.methods.base import Paper, param
from tprune.methods.cache import CacheMethod
from tprune.methods.cache_view import LayerView, StepView


@dataclass(frozen=True)
class DynamicContextPruning(CacheMethod):
    """The entries stay whose least interaction with any token after them is largest; one leaves for every new token."""

    paper = Paper(
        title="Dynamic Context Pruning for Efficient and Interpretable Autoregressive Transformers",
        venue="NeurIPS",
        year=2023,
        arxiv="2305.15805",
        code="sanagno/adaptively_sparse_attention",
        checked="code",
        notes="The authors drop an entry as soon as an interaction with a later token is not above 0, and their "
        "training decides how many that are; here the threshold is where the budget is, in every layer, and the loss "
        "on what is kept rests below it. The prompt itself attends to everything. Interaction keys are held beside "
        "the cache and count in its megabytes. Dropping across layers is left out, as by their default.",
    )
    kind = "trained"
    learns = "required"
    reads = ("inputs",)
    takes = ()
    built_in = {"sequence": 256, "batch": 2, "epochs": 0.25}

    size: int = param(64, "width of an interaction query or key", low=1)
    bias: float = param(2.0, "fit: what is added to interactions at first; above 0 all stay")
    alpha: float = param(8.0, "fit: how steep the sigmoid is in the end; 1 is the plain one", low=1)
    weight: float = param(0.3, "fit: of the loss on what is kept", low=0)
    sequence: int = param(1024, "fit: tokens of a training sequence", low=2)
    epochs: float = param(1.0, "fit: passes over the training text; the authors take 25,000 steps", low=0)
    batch: int = param(6, "fit: sequences per step", low=1)
    lr: float = param(1e-4, "fit: learning rate behind the warm-up", low=0)
    warmup: float = param(
        0.08, "fit: fraction of the steps at which the learning rate still rises", low=0, high=1
    )

    def start(self, layer: LayerView, count: int) -> Evict:
        """The `count` entries that the tokens after them can do without least."""
        if count == layer.length:
            return Evict.nothing(*layer.key.shape[:3], layer.key.device)
        query, key = (self.interacting(name, [layer.layer], layer.inputs) for name in ("query", "key"))
        least = lasting(query, key, self.state["bias"][layer.layer])
        least = least.unsqueeze(1).expand(-1, layer.groups, -1)  # [B, G, T]
        layer.state.update(least=least, key=key.unsqueeze(1))
        return Evict(top(least, count))

    def step(self, view: StepView) -> Replace:
        """What the new token says counts too; the entry that can be done without best leaves, and never its own."""
        inputs = view.inputs.unsqueeze(1)  # [L·B, 1, D]
        query, new = (self.interacting(name, view.layers, inputs).unsqueeze(1) for name in ("query", "key"))
        key = torch.cat([view.state["key"][:, :, :-1], new], dim=2)
        bias = self.state["bias"][view.layers].repeat_interleave(len(inputs) // len(view.layers))
        said = interaction(query, key, bias.view(-1, 1, 1, 1)).squeeze(2)  # [L·B, 1, T]
        least = view.state["least"].minimum(said)
        least[..., -1] = torch.inf
        view.state.update(least=least, key=key)
        return Replace(worst_between(least, view.position, view.fillers, 1))

    def interacting(self, name, layers, inputs):
        """Interaction queries or keys [L·B, t, r] of what some layers were given, [L·B, t, D], in its precision."""
        by_layer = inputs.float().reshape(len(layers), -1, inputs.shape[2])
        made = by_layer @ self.state[name][layers].mT
        return made.view(*inputs.shape[:2], -1).to(inputs.dtype)

    def fit(self, shape, keep, seed):
        """The interaction weights, and the model with them."""
        from tprune.methods.llm_context._dropping_fit import SoftDropping

        return SoftDropping(self, shape, keep, seed)
