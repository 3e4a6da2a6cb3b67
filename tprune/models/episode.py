"""What a method keeps from prompt to prompt: of an episode whose images follow one another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tprune.methods.tokens import TokenMethod
from tprune.models.run import Run, entered, here
from tprune.models.taps import AttentionCall
from tprune.models.track import Track


class Episode:
    """Shows a method the attention of the layers it watches, in prompts and in what is generated behind them.

    Attributes:
        memory: what the method keeps until `reset`; in `reduce` it is `memory["episode"]`.
    """

    def __init__(self, method: TokenMethod, depth: int):
        self.method, self.layers = method, frozenset(method.watches(depth))
        self.memory: dict[str, Any] = {}

    def reset(self) -> None:
        """A new episode begins."""
        self.memory.clear()

    def see(self, run: Run, place: int, call: AttentionCall) -> None:
        """Show the attention of layer `place`, if it is watched."""
        if place in self.layers and run.track.prunable is not None:
            image = image_places(run.track, place, call.key.shape[2])
            last = latest(run, place, call.query.shape[2])
            self.method.watch(place, call.view(), last, image, run.track.images, self.memory)


def latest(run: Run, place: int, queries: int) -> Tensor:
    """In every row the place of its latest token among the queries of a layer, int64 [B, 1]."""
    device = run.track.prunable.device
    column = torch.arange(queries, device=device).expand(len(run.track.prunable), -1)
    if not run.is_prompt:
        return column[:, -1:]
    kept = run.track.at(place)
    slots = column if kept is None else kept.index
    real = here(entered(run.real, run.track), slots, None if kept is None else kept.valid)
    return column.mul(real).argmax(1, keepdim=True)


def image_places(track: Track, layer: int, keys: int) -> Tensor:
    """Which of its row's image tokens each key of a layer is, int64 [B, T], counted from 0; -1 for all else."""
    prunable, kept = track.prunable, track.at(layer)
    batch, length = prunable.shape
    slots = torch.arange(keys, device=prunable.device).expand(batch, -1) if kept is None else kept.index
    real = torch.ones_like(slots, dtype=torch.bool) if kept is None or kept.valid is None else kept.valid
    if track.entry is not None:
        slots = track.entry.index.gather(1, slots)
    number = torch.where(prunable, prunable.cumsum(1) - 1, -1)
    return torch.where(real & (slots < length), number.gather(1, slots.clamp_max(length - 1)), -1)
