"""A small module that scores image tokens by what they read of the text: what lvpruning and covipal learn."""

from __future__ import annotations

from functools import partial
from math import gcd

import torch
from torch import Tensor, nn
from torch.nn import functional


class Guided(nn.Module):
    """Image tokens ask, words answer; what a token is and what it read goes through an MLP.

    Args:
        width: of a token.
        heads: of the cross-attention, or the most that divide the width and them.
        outputs: how many numbers a token gets.
    """

    def __init__(self, width: int, heads: int, outputs: int):
        super().__init__()
        self.heads = gcd(width, heads)
        # Without initial values: those would be drawn from the global generator.
        empty = partial(nn.utils.skip_init, nn.Linear, width)
        self.query, self.key, self.value = (empty(width, bias=False) for _ in range(3))
        self.inner, self.outer = empty(width), empty(outputs)

    def begin(self, generator: torch.Generator) -> Guided:
        """Itself, with initial values drawn from `generator`."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
            else:
                nn.init.zeros_(parameter)
        return self

    def forward(self, hidden: Tensor, words: Tensor) -> Tensor:
        """What every token gets, float32 [B, N, outputs].

        Args:
            hidden: [B, N, D], normalised here: the scale of a residual stream grows from layer to layer.
            words: bool [B, N], which tokens are words; at least one in every row.
        """
        hidden = functional.layer_norm(hidden.float(), hidden.shape[-1:])
        query, key, value = (
            part(hidden).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        read = functional.scaled_dot_product_attention(query, key, value, words[:, None, None])
        hidden = hidden + read.transpose(1, 2).flatten(2)
        return self.outer(functional.gelu(self.inner(hidden)))


def guided(
    state: dict[str, Tensor], name: str, heads: int, outputs: int, hidden: Tensor, words: Tensor
) -> Tensor:
    """`Guided` with what was learned under `name`, float32 [B, N, outputs]."""
    own = {key.removeprefix(f"{name}."): part for key, part in state.items() if key.startswith(f"{name}.")}
    module = Guided(hidden.shape[-1], heads, outputs)
    return torch.func.functional_call(module, own, (hidden, words))


def spoken(view) -> Tensor:
    """The words of a prompt without its answer, bool [B, N]: all real tokens that are not of an image."""
    return ~view.prunable if view.real is None else view.real & ~view.prunable
