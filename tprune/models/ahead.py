"""A layer's attention: where it is, and what it would be for inputs that the layer has not been given."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from tprune.errors import UserError
from tprune.methods.attention import Attention
from tprune.models.layer_inputs import CACHES
from tprune.models.run import Inputs
from tprune.models.taps import AttentionCall, Tap


class _SeenError(Exception):
    """Carries the attention out of a layer that shall go no further."""

    def __init__(self, call: AttentionCall):
        self.call = call


def attention_of(layer: nn.Module) -> nn.Module:
    """The attention module of a decoder layer.

    Raises:
        UserError: there is none (a recurrent or convolutional layer).
    """
    for module in layer.modules():
        if module is not layer and hasattr(module, "config") and type(module).__name__.endswith("Attention"):
            return module
    raise UserError(f"{type(layer).__name__} has no attention that can be watched")


def attention_ahead(layer: nn.Module, given: Inputs) -> Attention:
    """The queries and keys that `layer` makes of its inputs `given`: it runs up to its attention and no further.

    Its norm, projections and rotation are the model's own, whatever they are; its cache is not touched.
    """

    def stop(call: AttentionCall) -> None:
        raise _SeenError(call)

    with Tap([attention_of(layer)], stop, first=True):
        try:
            layer.forward(**{name: None if name in CACHES else value for name, value in given.items()})
        except _SeenError as seen:
            return seen.call.view()
    raise UserError(f"the attention of {type(layer).__name__} does not go through transformers' interface")


def unrotated(given: Inputs) -> Inputs:
    """The inputs of a layer with rotary embeddings that turn nothing."""
    rope = given.get("position_embeddings")
    if not isinstance(rope, tuple):
        return given
    return given | {"position_embeddings": (torch.ones_like(rope[0]), torch.zeros_like(rope[1]))}


def rotated_ones(layer: nn.Module, given: Inputs) -> Tensor:
    """A query of ones at the positions that `layer` was given, rotated by the model's own function: [B, N, d]."""
    module, rope = attention_of(layer), given.get("position_embeddings")
    rotate = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if rotate is None or not isinstance(rope, tuple):
        raise UserError(f"{type(module).__name__} has no rotary embeddings, which this method reads")
    ones = rope[0].new_ones(*given["hidden_states"].shape[:2], rope[0].shape[-1]).unsqueeze(1)
    return rotate(ones, ones, *rope)[0].squeeze(1)
