"""TokenButler's predictor: a small module beside the first layer that foresees what all heads of all layers look at."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from tprune.core.rotary import frequencies, rotated
from tprune.errors import UserError


class Predictor(nn.Module):
    """One narrow attention and an MLP, then a query and a key per layer and head.

    Args:
        width: D, of a token.
        depth, heads: of the model.
        reduce: how many times narrower the attention is.
        inner: width of the two last MLPs.
        size: of a query or key.
        base: of the model's rotary embeddings.
    """

    def __init__(self, width: int, depth: int, heads: int, reduce: int, inner: int, size: int, base: float):
        super().__init__()
        narrow = width // reduce
        if width % reduce or narrow % (2 * heads) or size % 2:
            raise UserError(
                f"tokenbutler: {width} channels by reduce={reduce} make no even part for each of {heads} heads, or "
                f"size={size} is odd; change --set reduce=… or size=…"
            )
        self.heads, self.groups, self.size, self.base = heads, depth * heads, size, base
        linear = partial(nn.Linear, bias=False)
        # Without values: those would be drawn from the global generator.
        with torch.device("meta"):
            self.narrow = linear(width, narrow)
            self.query, self.key, self.value = (linear(narrow, narrow) for _ in range(3))
            self.norm = nn.LayerNorm(narrow)
            self.up, self.down = nn.Linear(narrow, 2 * narrow), nn.Linear(2 * narrow, width)
            self.asks, self.is_asked = (
                nn.ModuleList([linear(width, inner), linear(inner, self.groups * size)]) for _ in range(2)
            )

    def begin(self, generator: torch.Generator) -> Predictor:
        """Itself, with initial values drawn from `generator` (Xavier)."""
        self.to_empty(device="cpu")
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                nn.init.zeros_(parameter)
        nn.init.ones_(self.norm.weight)
        return self

    def forward(
        self,
        inputs: Tensor,
        position: Tensor,
        visible: Tensor | None = None,
        memory: MutableMapping[str, Tensor] | None = None,
        drop: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> tuple[Tensor, Tensor]:
        """What every head asks for and is asked by: [B, L·H, q, size] and [B, L·H, T, size], rotated.

        Args:
            inputs: [B, q, D], of the first layer's attention.
            position: int64 [B, q].
            visible: bool [B, 1, q, T], which tokens each may see; None for those up to itself.
            memory: keys and values of earlier tokens, to which these are added.
            drop: dropout, while it is trained.
        """
        memory = {} if memory is None else memory

        def split(x: Tensor, heads: int) -> Tensor:
            return x.unflatten(2, (heads, -1)).transpose(1, 2)

        def remember(name: str, x: Tensor) -> Tensor:
            memory[name] = torch.cat([memory[name], x], dim=2) if name in memory else x
            return memory[name]

        inputs = inputs.to(self.narrow.weight.dtype)
        narrow = self.narrow(inputs)
        turn = partial(
            rotated, position=position, frequency=frequencies(narrow.shape[-1] // self.heads, self.base)
        )
        query = turn(split(self.query(narrow), self.heads))
        key = remember("key", turn(split(self.key(narrow), self.heads)))
        value = remember("value", split(self.value(narrow), self.heads))
        read = functional.scaled_dot_product_attention(query, key, value, visible, is_causal=visible is None)
        read = self.norm(read.transpose(1, 2).flatten(2))
        hidden = inputs + drop(self.down(functional.gelu(self.up(read))))
        turn = partial(rotated, position=position, frequency=frequencies(self.size, self.base))
        asks, is_asked = (
            turn(split(last(functional.silu(first(hidden))), self.groups))
            for first, last in (self.asks, self.is_asked)
        )
        return asks, remember("is_asked", is_asked)
