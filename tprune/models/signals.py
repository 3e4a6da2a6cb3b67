"""What a method inside a decoder may look at besides the attention that ran, each computed when it asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tprune.core.budget import Site
from tprune.core.reduction import gather_tokens
from tprune.errors import UserError
from tprune.methods.attention import Attention
from tprune.models.ahead import attention_ahead, attention_of, rotated_ones, unrotated
from tprune.models.beside import Beside
from tprune.models.copies import Copies
from tprune.models.layer_inputs import LayerInputs
from tprune.models.run import Inputs, Run, here

NORMS = ("norm", "final_layer_norm", "ln_f", "final_layernorm")
FEED_FORWARDS = ("mlp", "feed_forward", "block_sparse_moe")


def watch(layers: Sequence[nn.Module], reads: Sequence[str], current: Callable[[], Run | None]) -> list[Any]:
    """Hooks that keep, of a prompt and where a site follows, "sublayers" and "neurons", if they are in `reads`.

    Raises:
        UserError: the layers have none that can be watched.
    """
    handles: list[Any] = []

    def followed(place: int) -> Run | None:
        run = current()
        return run if run is not None and run.is_prompt and Site(place + 1) in run.counts else None

    def pass_hook(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: Inputs, output: Any) -> None:
            if (run := followed(place)) is not None:
                entering = args[0] if args else kwargs["hidden_states"]
                leaving = output[0] if isinstance(output, tuple) else output
                run.sublayers.setdefault(place, []).append((entering, leaving))

        return hook

    def neuron_hook(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple) -> None:
            if (run := followed(place)) is not None:
                run.neurons = args[0]

        return hook

    for place, layer in enumerate(layers):
        if "sublayers" in reads:
            for module in (attention_of(layer), _feed_forward(layer)):
                handles.append(module.register_forward_hook(pass_hook(place), with_kwargs=True))
        if "neurons" in reads:
            down = getattr(_feed_forward(layer), "down_proj", None)
            if not isinstance(down, nn.Module):
                raise UserError(f"{type(layer).__name__} has no gated MLP whose neurons can be watched")
            handles.append(down.register_forward_pre_hook(neuron_hook(place)))
    return handles


def _feed_forward(layer: nn.Module) -> nn.Module:
    """The MLP of a decoder layer."""
    for name in FEED_FORWARDS:
        if hasattr(layer, name):
            return getattr(layer, name)
    raise UserError(f"{type(layer).__name__} has no MLP that can be watched")


class Signals:
    """The rarer signals of a decoder's sites.

    - "final_norm": [B, N, D], the tokens behind the decoder's last norm;
    - "next_attention": the `Attention` that the layer behind the site would compute if nothing left there;
    - "unrotated_attention": of the layer before the site, on what it was given, without rotary embeddings;
    - "rotated_ones": [B, N, d], a query of ones as the layer before the site rotates it;
    - "sublayers": of the layer before the site, [(in, out), (in, out)] of attention and MLP, each [B, N, D]: behind
      their norms, before the residual is added;
    - "hidden": bool [B, N], tokens that have left and are still computed (`TokenMethod.hides`);
    - "neurons": [B, N, F], what the layer before the site fed into the last projection of its MLP;
    - "embeddings": [B, N, D], these tokens as they entered the decoder;
    - "cells": int64 [B, N, 3], every image token's crop, row and column in it; -1 where it has none;
    - "encoded": [B, N, C], one for each block in the order of `TokenMethod.encoder_blocks`, what image tokens are made
      of behind it, zeros for all others;
    - "crops": int64 [C, 3] on the CPU and bool [B, N], the crops that "cells" counts: each one's image, and its row and
      column among the tiles of it, -1 where it is none; and which image tokens belong to no crop (newlines);
    - "beside": `models.beside.Behind`, tokens of the method's own behind the prompt;
    - "copies": `models.copies.Copies`, copies of layers that read the prompt; before the first layer alone.

    Args:
        core, layers: the decoder and its layers.
        inputs: fits what a layer is given to the tokens that are left.
        images: tells of a prompt's images, from its inputs: `cells`, `crops` and `encoded` (`Projector`).
    """

    def __init__(
        self,
        core: nn.Module,
        layers: Sequence[nn.Module],
        inputs: LayerInputs,
        images: Any,
    ):
        self.core, self.layers, self.inputs, self.images = core, layers, inputs, images
        self.beside: Beside | None = None
        self.norm = next((getattr(core, name) for name in NORMS if hasattr(core, name)), None)

    def watch(self, model: nn.Module, reads: Sequence[str], current: Callable[[], Run | None]) -> list[Any]:
        """Whatever must be seen while the prompt runs, as `watch`; "beside" of the decoder of `model` too."""
        handles = watch(self.layers, reads, current)
        if "beside" in reads:
            parts = [attention_of(layer) for layer in self.layers]
            self.beside = Beside(
                self.core,
                self.layers,
                parts,
                self.inputs,
                lambda hidden: model.get_output_embeddings()(self.norm(hidden)),
                current,
            )
            handles.append(self.beside)
        return handles

    def at(
        self, run: Run, place: int, given: Inputs, slots: Tensor, position: Tensor
    ) -> dict[str, Callable[[], Any]]:
        """The signals before layer `place`.

        Args:
            run: this prompt's forward.
            place: which layer.
            given: what it would be given, made for all tokens that entered, but for the hidden states.
            slots, position: int64 [B, N], the tokens' places in the entering and in the caller's sequence.
        """
        hidden = given["hidden_states"]

        def ahead() -> Attention:
            fitted, kept = dict(given), run.track.at(place)
            if kept is not None:
                self.inputs.fit(run, place, kept, fitted)
            return attention_ahead(self.layers[place], fitted)

        def crops() -> tuple[Tensor, Tensor]:
            table, between = self.images.crops(run.inputs)
            return table, between.to(hidden.device).gather(1, position)

        return {
            "final_norm": lambda: self.norm(hidden),
            "next_attention": ahead,
            "unrotated_attention": lambda: attention_ahead(self.layers[place - 1], unrotated(run.before)),
            "rotated_ones": lambda: rotated_ones(self.layers[place - 1], run.before),
            "neurons": lambda: run.neurons,
            "sublayers": lambda: run.sublayers[place - 1],
            "hidden": lambda: _hidden(run, place, slots, position),
            "embeddings": lambda: gather_tokens(run.embeddings, slots),
            "cells": lambda: gather_tokens(self.images.cells(run.inputs).to(hidden.device), position),
            "crops": crops,
            "copies": lambda: Copies(self.core, self.layers, run, given),
            "encoded": lambda: [gather_tokens(one, position) for one in self.images.encoded(run.inputs)],
            "beside": lambda: self.beside.of(
                run.heard, here(run.real, position, run.track.valid(place, slots))
            ),
        }


def _hidden(run: Run, place: int, slots: Tensor, position: Tensor) -> Tensor:
    """Which of the tokens before layer `place` are no fillers, and no longer attended to."""
    kept, entry = run.track.at(place), run.track.entry
    if kept is None or kept.valid is None:
        return torch.zeros_like(position, dtype=torch.bool)
    real = run.real.gather(1, position)
    if entry is not None and entry.valid is not None:
        real = real & entry.valid.gather(1, slots)
    return real & ~kept.valid
