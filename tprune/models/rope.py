"""Moving keys that are already rotated: RoPE turns a key by its position, so turning it further moves it on."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from tprune.errors import UserError

FIXED = ("default", "linear", "llama3", "yarn", "proportional")
"""RoPE whose frequencies do not change with the length of the text."""

KNOWN = 1 << 22
"""Cosines, and as many sines, that are held on a CPU (32 MB): of 65,536 positions of 64 channels."""


def rotary_embedding(model: nn.Module) -> nn.Module | None:
    """The module that makes a model's cosines and sines; None without RoPE."""
    found = (module for module in model.modules() if hasattr(module, "rope_type") and module is not model)
    return next(found, None)


class Rotation:
    """A model's own rotary embedding, applied to keys once more.

    Args:
        model: with RoPE.
        what: who asks for it, and `mend`, what to do where it cannot be had: begin and end of the errors.

    Raises:
        UserError: the model has no RoPE, or one whose frequencies change with the length.
    """

    def __init__(
        self,
        model: nn.Module,
        what: str = "--positions compact",
        mend: str = "use --positions original",
    ):
        self.embedding = rotary_embedding(model)
        if self.embedding is None:
            raise UserError(f"{what} turns rotated keys, and this model has no RoPE; {mend}")
        kinds = self.embedding.rope_type
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind not in FIXED:
                raise UserError(f"{what}: the frequencies of '{kind}' RoPE change with the length; {mend}")
        self.apply = getattr(sys.modules[type(self.embedding).__module__], "apply_rotary_pos_emb", None)
        if self.apply is None:
            raise UserError(f"{what} does not know how {type(model).__name__} rotates keys; {mend}")
        self._known: tuple[Any, ...] | None = None
        self._rotated: dict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]] = {}
        self.typed = "layer_type" in inspect.signature(self.embedding.forward).parameters

    def turn(self, keys: Tensor, shift: Tensor, layer_type: str | None) -> Tensor:
        """`keys` [B, G, m, d] moved on by `shift` [B, G, m] positions, in float32 and back."""
        flat = keys.flatten(0, 1).unsqueeze(1).float()
        cos, sin = self._angles(flat, shift, layer_type)
        _, turned = self.apply(flat[:, :0], flat, cos, sin)
        return turned.squeeze(1).view(keys.shape).to(keys.dtype)

    def rotate(self, keys: Tensor, position: Tensor, layer_type: str | None) -> Tensor:
        """Keys [B, G, t, d] that nothing has turned yet, as the model rotates them at `position` int64 [B, t]."""
        return self.apply(keys[:, :0], keys, *self._waves(keys, position, layer_type))[1]

    def _waves(self, keys: Tensor, position: Tensor, layer_type: str | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, t, d] at `position`; on a CPU known from the layer before, which asked for the same."""
        kind: tuple[Any, ...] = (layer_type,) if self.typed else ()
        if position.device.type != "cpu":  # to compare, the host would wait for the device
            return self.embedding(keys, position, *kind)
        if torch.equal(position, position[:1].expand_as(position)):
            position = position[:1]  # as in a batch without padding
        inference = torch.is_inference_mode_enabled()  # such tensors cannot take part in gradients later
        known = (layer_type, keys.dtype, int(position[0, 0]), inference)
        found = self._rotated.get(known)
        if found is None or not torch.equal(found[0], position):
            found = position, *self.embedding(keys, position, *kind)
            self._rotated.pop(known, None)  # a stretch that has grown
            if sum(cos.numel() for _, cos, _ in self._rotated.values()) + found[1].numel() > KNOWN:
                self._rotated.clear()
            self._rotated[known] = found
        return found[1:]

    def _angles(self, flat: Tensor, shift: Tensor, layer_type: str | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B·G, m, d]; computed once where layer after layer turns by the same."""
        known = self._known
        if known is not None and (layer_type, shift.device) == known[:2] and torch.equal(known[2], shift):
            return known[3]
        kind: tuple[Any, ...] = (layer_type,) if self.typed else ()
        cos, sin = self.embedding(flat, shift.flatten(0, 1), *kind)
        name = f"{layer_type}_attention_scaling" if self.typed else "attention_scaling"
        scaling = getattr(self.embedding, name)
        self._known = layer_type, shift.device, shift, (cos / scaling, sin / scaling)
        return self._known[3]
