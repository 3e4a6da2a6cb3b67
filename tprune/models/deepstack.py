"""Qwen3-VL adds features of its tower behind its first decoder layers: they follow the tokens that are left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tprune.core.reduction import gather_tokens
from tprune.models.run import Run


class Deepstack:
    """Adds what belongs to the tokens that are left, until `remove`; nothing where a decoder adds no such features.

    Args:
        core: the decoder.
        run_of: gives the forward that is under way, None where nothing leaves in it.
        depth: how many layers it has; behind the last one everything is back.
    """

    def __init__(self, core: nn.Module, run_of: Callable[[], Run | None], depth: int):
        self.core, self.run_of, self.depth, self.hook = core, run_of, depth, None
        if hasattr(core, "_deepstack_process"):
            self.hook = core.register_forward_pre_hook(self._number, with_kwargs=True)
            self.add, core._deepstack_process = core._deepstack_process, self._add

    def remove(self) -> None:
        """Give the decoder its own way back."""
        if self.hook is not None:
            self.hook.remove()
            del self.core._deepstack_process

    def _number(self, core: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Tell the features of each layer which it is."""
        features = kwargs.get("deepstack_visual_embeds")
        if features is None or self.run_of() is None:
            return None
        return args, kwargs | {"deepstack_visual_embeds": list(enumerate(features))}

    def _add(self, hidden: Tensor, mask: Tensor, features: Tensor | tuple[int, Tensor]) -> Tensor:
        """Add to `hidden` [B, K, D], behind a layer, the features [M, D] of the tokens `mask` [B, N] marks."""
        if isinstance(features, Tensor):
            return self.add(hidden, mask, features)
        layer, features = features
        track = self.run_of().track
        full = torch.zeros(*mask.shape, hidden.shape[2], dtype=hidden.dtype, device=hidden.device)
        full[mask.to(full.device)] = features.to(full)
        if track.entry is not None:
            full = gather_tokens(full, track.entry.index)
        kept = track.at(layer) if layer < self.depth - 1 else None
        return hidden + (full if kept is None else gather_tokens(full, kept.index))
