"""Attention heads leave from layer to layer of a decoder, beside its tokens.

A head that has left reads nothing in the layers behind, nor do the tokens that come later use it there. What it would
have read is set to zero before the output projection; the fused kernel stays in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tprune.core.ranks import rank
from tprune.methods.tokens import Shape, TokenMethod
from tprune.models.decoder import DecoderDriver
from tprune.models.run import Inputs, here
from tprune.models.signals import attention_of
from tprune.models.taps import AttentionCall, Output, Tap


class CascadingDriver(DecoderDriver):
    """A token method that `cascades` at work, until `remove`.

    Attributes:
        plan: int64 [L, B], how many heads every layer of the prompt's rows keeps.
        alive: bool [B, H], the heads that are left.
        worth: float32 [B, H], what those have read so far, in absolute values.
    """

    def __init__(self, model: nn.Module, method: TokenMethod, *args: Any, **kwargs: Any):
        super().__init__(model, method, *args, **kwargs)
        self.plan: Tensor | None = None
        self.alive: Tensor | None = None
        self.worth: Tensor | float = 0.0
        self.reading = Tap([attention_of(layer) for layer in self.layers], self._read)

    def remove(self) -> None:
        """Take all hooks out again."""
        self.reading.remove()
        super().remove()

    def _begin(self, module: nn.Module, args: tuple, kwargs: Inputs) -> None:
        """As ever; and how many heads each row keeps, by its own number of tokens."""
        super()._begin(module, args, kwargs)
        if self.run is None or not self.run.is_prompt:
            return
        heads = self.model.config.get_text_config(decoder=True).num_attention_heads
        rows = self.run.prunable.sum(1).tolist()
        shapes = [Shape(len(self.layers), tokens, heads=heads) for tokens in rows]
        plans = [self.method.heads(shape, self.stages_of(shape.tokens)) for shape in shapes]
        device = self.run.prunable.device
        self.plan = torch.tensor(plans, device=device).T
        self.alive = torch.ones(len(rows), heads, dtype=torch.bool, device=device)
        self.worth = 0.0

    def _read(self, call: AttentionCall) -> Output | None:
        """What the heads of one layer read, those that have left nothing."""
        run = self.run
        if run is None:
            return None
        place, output = self.place[call.module], self.method.attend(call.view())
        if output is None:
            output = call.attend(call.query, call.key, call.value, call.mask)[0]
        else:
            output = output.transpose(1, 2)
        if run.is_prompt:
            self._let_leave(place, output)
        return output * run.track.heads[place][:, None, :, None], None

    def _let_leave(self, place: int, output: Tensor) -> None:
        """Which heads a layer of the prompt keeps: of those of the layer before the ones that have read most.

        `output` is [B, N, H, d].
        """
        run = self.run
        best = rank(torch.where(self.alive, self.worth, -torch.inf))
        self.alive = self.alive & (best < self.plan[place].unsqueeze(1))
        run.track.heads[place] = run.memory["heads"] = self.alive
        kept = run.track.at(place)
        real = run.real if kept is None else here(run.real, kept.index, kept.valid)
        self.worth = self.worth + (output.float().abs().sum(3) * real.unsqueeze(2)).sum(1)
