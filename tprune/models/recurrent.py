"""Language models that carry a state from token to token and cache no keys, and tokens that leave between their layers.

There are no positions, and no masks but of padding: what leaves is taken out of the sequence, and what follows the
prompt goes on from the state of every layer. transformers starts that state anew where several tokens follow at once,
and lets it decay over padding behind a prompt, so both are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from tprune.core.budget import Site
from tprune.core.recurrence import Recurrence
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.base import Method
from tprune.methods.token_view import TokenView
from tprune.methods.tokens import TokenMethod
from tprune.models.blocks import check_no_encoder
from tprune.models.decoder import DecoderDriver
from tprune.models.run import Inputs, Run
from tprune.models.text_encoder import is_encoder

MIXER = "MambaMixer"


def carries_state(cache: Any) -> bool:
    """Whether every layer of a cache holds a state alone, and no keys."""
    layers = getattr(cache, "layers", [])
    return bool(layers) and all(
        hasattr(layer, "recurrent_states") and not hasattr(layer, "keys") for layer in layers
    )


def is_recurrent(model: nn.Module) -> bool:
    """Whether a language model is a state-space model without attention."""
    config = getattr(model, "config", None)
    return config is not None and carries_state(DynamicCache(config=config))


def admit(method: Method, model: nn.Module) -> None:
    """Refuse a method that does not work in this kind of language model.

    Raises:
        UserError: naming what does.
    """
    check_no_encoder(model)
    recurrent, name = is_recurrent(model), type(model).__name__
    if not hasattr(model, "config"):
        raise UserError(f"{name} is no language model of transformers; use one such as smollm2-135m")
    if is_encoder(model.config):
        able = ", ".join(registry.running_on("encoder", method.family))
        raise UserError(
            f"{name} is a text encoder, where {method.id} does not work; use {able}, or a decoder such as smollm2-135m"
        )
    if ("state-space" if recurrent else "plain") in method.runs_on:
        return
    if recurrent:
        able = ", ".join(registry.running_on("state-space", method.family))
        raise UserError(
            f"{name} is a state-space model without attention, where {method.id} does not work; use {able}, or a "
            "decoder with attention such as smollm2-135m"
        )
    raise UserError(
        f"{name} is no state-space model, which {method.id} is for; use one such as state-spaces/mamba-130m-hf"
    )


def logits_behind(model: nn.Module, cache: DynamicCache, ids: Tensor, **more: Any) -> Tensor:
    """Logits of the tokens `ids` [B, N] behind all that `cache` has seen, which then has seen them too.

    `cache` is made for the model (`DynamicCache(config=…)`); `more` goes to the model. A state takes later tokens one
    by one.
    """
    if not carries_state(cache):
        return model(input_ids=ids, past_key_values=cache, **more).logits
    parts = ids.split(1, dim=1) if cache.has_previous_state() else [ids]
    return torch.cat([model(input_ids=part, cache_params=cache, **more).logits for part in parts], dim=1)


def recurrence(mixer: nn.Module, x: Tensor, projected: Tensor) -> Recurrence:
    """What the scan of a `MambaMixer` runs on, of the input [B, N, E] and the output of its `x_proj`."""
    states = mixer.ssm_state_size
    low, into, out = projected.split([mixer.time_step_rank, states, states], dim=-1)
    step = functional.softplus((low @ mixer.dt_proj.weight.T).float() + mixer.dt_proj.bias.float())
    x, step, into, out = (part.transpose(1, 2) for part in (x, step, into, out))
    return Recurrence(x, step, -mixer.A_log.float().exp(), into, out)


class RecurrentDriver(DecoderDriver):
    """A token method at work inside transformers' Mamba, until `remove`.

    Args:
        model, method, args: as `DecoderDriver` has them.
        positions: as there; there are none that could be "compact".
    """

    def __init__(self, model: nn.Module, method: TokenMethod, *args: Any, positions: str = "original"):
        if positions == "compact":
            raise UserError("--positions compact: a state-space model has no positions; leave it out")
        super().__init__(model, method, *args)
        self.mixers = [getattr(layer, "mixer", None) for layer in self.layers]
        others = {type(part).__name__ for part in self.mixers} - {MIXER}
        if others:
            self.remove()
            raise UserError(
                f"{type(model).__name__}: {method.id} reads the recurrence of {MIXER}, and {', '.join(sorted(others))} "
                "has another; use a first-generation Mamba such as state-spaces/mamba-130m-hf"
            )
        self.projected: tuple[Tensor, Tensor] | None = None
        self.handles += [
            mixer.x_proj.register_forward_hook(self._watcher(Site(place + 1)))
            for place, mixer in enumerate(self.mixers)
        ]

    def _watcher(self, following: Site) -> Callable[..., None]:
        """Keeps what the scan runs on, where a site follows."""

        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if self.run is not None and following in self.run.counts:
                self.projected = args[0], output

        return hook

    def _begin(self, module: nn.Module, args: tuple, kwargs: Inputs) -> None:
        """A prompt to prune; what follows one goes on from the states as they are."""
        inputs = dict(zip(self.names[module], args, strict=False)) | kwargs
        cache, mask = inputs.pop("cache_params", None), inputs.get("attention_mask")
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        self.run = None
        if cache is not None and cache.has_previous_state():
            if tokens.shape[1] > 1:
                raise UserError(
                    f"{tokens.shape[1]} tokens at once behind a cache: {type(module).__name__} starts its state anew "
                    "then; pass them one by one"
                )
            return
        if isinstance(mask, Tensor) and not bool(mask[:, -1].all()):
            raise UserError(
                "a state-space model goes on over padding behind a prompt: pad on the left (padding_side='left')"
            )
        super()._begin(module, (), inputs)

    def _view(self, run: Run, site: Site, given: Inputs) -> tuple[TokenView, Tensor]:
        """As ever, with the recurrence of the layer that ran last."""
        view, slots = super()._view(run, site, given)
        mixer, projected = self.mixers[site.layer - 1], self.projected
        view.signals["recurrence"] = lambda: recurrence(mixer, *projected)
        return view, slots

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        super()._end(module, args, output)
        self.projected = None
