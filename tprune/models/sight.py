"""Attention to other tokens than those that are left, with a block's own weights, whatever its make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tprune.core.reduction import Sight
from tprune.errors import UserError


class Grouped(TorchFunctionMode):
    """Lets the one fused attention call that happens while it is active run in groups.

    A group's queries see its keys alone; a mask or a bias by relative position does not apply. Tokens that are
    nobody's query get zeros.

    Args:
        queries, keys: int64 [G, q] and [G, m], places in the sequence; no place is a query twice.
    """

    def __init__(self, queries: Tensor, keys: Tensor):
        super().__init__()
        self.queries, self.keys, self.ran = queries, keys, False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Run fused attention in groups, and everything else as it is."""
        kwargs = kwargs or {}
        if function is not nn.functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        self.ran = True
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        query = given["query"]
        batch, heads, length, width = query.shape
        groups, count = self.queries.shape

        def grouped(x: Tensor, place: Tensor) -> Tensor:
            return x[:, :, place].transpose(1, 2).reshape(batch * groups, heads, place.shape[1], width)

        rest = {name: given[name] for name in ("dropout_p", "scale") if name in given}
        out = function(
            grouped(query, self.queries),
            grouped(given["key"], self.keys),
            grouped(given["value"], self.keys),
            **rest,
        )
        out = out.view(batch, groups, heads, count, width).transpose(1, 2).flatten(2, 3)
        return query.new_zeros(query.shape).index_copy(2, self.queries.flatten(), out)


def attend_to(
    attend: Callable[..., Tensor], x: Tensor, sight: Sight, prefix: int, *args: Any, **kwargs: Any
) -> Tensor:
    """What the attention half `attend` of a block makes of `x` [B, N, D] where it sees what `sight` says: [B, N, D].

    Raises:
        UserError: the attention does not run as torch's scaled_dot_product_attention.
    """
    length = x.shape[1]
    whole = x if sight.tokens is None else torch.cat([x, sight.tokens], 1)
    first = prefix if sight.tokens is None else length
    every = torch.arange(whole.shape[1], device=x.device)
    queries, keys = every[None, :length], torch.cat([every[:prefix], every[first:]])[None]
    if sight.queries is not None:
        queries, keys = sight.queries.to(x.device), sight.keys.to(x.device) + first
    with Grouped(queries, keys) as mode:
        found = attend(whole, *args, **kwargs)[:, :length]
    if not mode.ran:
        raise UserError(
            "this model's attention does not run as torch's scaled_dot_product_attention; load it with "
            "fused attention (attn_implementation='sdpa', TIMM_FUSED_ATTN=1)"
        )
    return found
