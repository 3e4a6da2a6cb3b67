"""Attention watched where torch computes it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tprune.methods.attention import Attention


class Watch(TorchFunctionMode):
    """Sees what goes into and comes out of the one fused attention call that happens while it is active.

    `bias`, [B, 1, 1, N] or None, is added to its logits, for blocks that take no mask of their own. Where there is an
    `edit`, the map is computed beside the kernel, and what `edit` makes of it takes the kernel's place.
    """

    def __init__(self, bias: Tensor | None = None, edit: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.bias, self.edit, self.seen = bias, edit, None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Note what fused attention is given, and let it run."""
        kwargs = kwargs or {}
        if function is nn.functional.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask")
            given = dict(zip(names, args, strict=False)) | kwargs
            if self.bias is not None:
                given["attn_mask"] = self.bias
                args, kwargs = (), given
            scale = given.get("scale") or given["query"].shape[-1] ** -0.5
            self.seen = Attention(given["query"], given["key"], given["value"], scale, given.get("attn_mask"))
            if self.edit is not None:
                self.seen.map = self.edit(self.seen.rows())
                self.seen.output = self.seen.map.to(self.seen.value.dtype) @ self.seen.value
            else:
                self.seen.output = function(*args, **kwargs)
            return self.seen.output
        return function(*args, **kwargs)
