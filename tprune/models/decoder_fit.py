"""A vision-language model while a token method is fitted in it: tokens leave, or stay and are marked as absent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tprune.core.attending import attend
from tprune.core.budget import PROJECTOR, Site, Stage
from tprune.core.reduction import Reduction
from tprune.core.relax import mask_attention
from tprune.methods.attention import Attention
from tprune.methods.fit import Fit, Relaxed
from tprune.methods.token_view import TokenView
from tprune.methods.tokens import TokenMethod
from tprune.models.decoder import DecoderDriver
from tprune.models.run import Inputs, Run
from tprune.models.signals import attention_of
from tprune.models.taps import AttentionCall, Output, Tap


class EnoughError(Exception):
    """Raised before a decoder's first layer where nothing of it is learned from."""


class Learning:
    """A method whose choices are those of its `Fit`; all else is the method's own."""

    before_tower = False

    def __init__(self, method: TokenMethod, fit: Fit):
        self.method, self.fit = method, fit

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def reduce(
        self, site: Site, view: TokenView, count: int | Tensor, memory: dict[str, Any]
    ) -> Reduction | Relaxed:
        """What happens at `site`; what is left of a prompt's image tokens is noted in `memory`."""
        found = self.fit.at(site, view, memory)
        there = view.prunable
        if isinstance(found, Relaxed):
            left = found.present[there].sum() / there.sum()
        else:
            kept = found.gather(there)
            left = (kept if found.valid is None else kept & found.valid).sum() / there.sum()
            before = memory["left"][-1].count if site != PROJECTOR and memory["left"] else 1.0
            left = left * before
        memory["left"].append(Stage(site, left))
        return found


class DecoderFitDriver(DecoderDriver):
    """Runs a method's `Fit` at its sites until removed.

    Every forward starts with an empty `memory`; its "left" tells what fraction of the image tokens each site left, with
    a gradient where they are marked, and "attention" holds the attention of the layers that the fit `watches`.

    Args:
        model: a transformers model with a decoder.
        method: what happens at the sites.
        more: as for `DecoderDriver`.

    Attributes:
        answers: bool [B, N], the tokens of the coming prompt that are answers: a method must not see them.
    """

    def __init__(self, model: nn.Module, method: Learning, *more: Any, **named: Any):
        self.fit, self.memory = method.fit, {}
        self.answers: Tensor | None = None
        self.present: Tensor | None = None
        self.passing: Tensor | None = None
        self.absent = False
        super().__init__(model, method, *more, **named)
        modules = [attention_of(layer) for layer in self.layers]
        self.places = {module: place for place, module in enumerate(modules)}
        self.weigher = Tap(modules, self._weigh)
        if method.returns:
            self.handles += [layer.register_forward_hook(self._mix) for layer in self.layers]

    def remove(self) -> None:
        """Take all hooks out again."""
        super().remove()
        self.weigher.remove()

    @contextmanager
    def away(self) -> Iterator[None]:
        """The model without the method, for a while; what the fit watches meanwhile is `memory["dense"]`."""
        self.memory["dense"], self.absent, self.present = {}, True, None
        try:
            yield
        finally:
            self.absent = False

    def _begin(self, module: nn.Module, args: tuple, kwargs: Inputs) -> None:
        self.present = None
        if self.absent:
            self.run = None
            return
        super()._begin(module, args, kwargs)
        self.memory = self.run.memory
        self.memory |= {"left": [], "attention": {}, "dense": {}}

    def _enter(self, module: nn.Module, args: tuple, kwargs: Inputs) -> tuple[tuple, Inputs] | None:
        found = super()._enter(module, args, kwargs)
        if self.run is not None and not self.fit.answers and self.fit.sites == (PROJECTOR,):
            raise EnoughError
        return found

    def _real(self, inputs: Inputs, prunable: Tensor) -> Tensor:
        """The prompt without its answer."""
        real = super()._real(inputs, prunable)
        return real if self.answers is None else real & ~self.answers

    def _view(self, run: Run, site: Site, given: Inputs) -> tuple[TokenView, Tensor]:
        view, slots = super()._view(run, site, given)
        view.present = self.present
        return view, slots

    def _take(
        self, run: Run, site: Site, view: TokenView, slots: Tensor, found: Reduction | Relaxed
    ) -> Tensor:
        if isinstance(found, Relaxed):
            self.present, run.attention = found.present, None
            self.passing = found.hidden.to(view.hidden.dtype)
            return self.passing
        if self.present is not None:
            self.present = found.gather(self.present)
        return super()._take(run, site, view, slots, found)

    def _mix(self, layer: nn.Module, args: tuple, output: Any) -> Any:
        """Behind a layer that tokens pass by: those come out as they went in."""
        if self.present is None:
            return output
        through = output[0] if isinstance(output, tuple) else output
        gate = self.present.unsqueeze(2).to(through.dtype)
        through = gate * through + (1 - gate) * self.passing
        return (through, *output[1:]) if isinstance(output, tuple) else through

    def _weigh(self, call: AttentionCall) -> Output | None:
        """Attention among what is present; kept where the fit watches, with its map in the graph."""
        watched = self.places[call.module] in self.fit.watches
        if self.present is None and not watched:
            return None
        rows = finite(call.view()).rows()
        if self.fit.explains and watched and not rows.requires_grad:
            rows.requires_grad_()
        if watched:
            self.memory["dense" if self.absent else "attention"][self.places[call.module]] = rows
        if self.present is not None:
            rows = mask_attention(rows, self.present, self.fit.epsilon, self.fit.keep_self)
        return attend(rows, call.value).transpose(1, 2), None


def finite(attention: Attention) -> Attention:
    """The same, where rows that see nothing (padding) see themselves: a gradient through them would be none."""
    bias = attention.bias
    if bias is not None and bias.dtype == torch.bool:
        own = torch.eye(bias.shape[-1], dtype=torch.bool, device=bias.device)[-bias.shape[-2] :]
        attention.bias = bias | (own & ~bias.any(-1, keepdim=True))
    return attention
