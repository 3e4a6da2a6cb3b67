"""What a decoder layer is given besides hidden states: mask, positions and rotary embeddings of what is left."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from tprune.errors import UserError
from tprune.models.run import Inputs, Run
from tprune.models.track import (
    Kept,
    gather_last,
    gather_mask,
    gather_padding,
    gather_rope,
    hidden_value,
    visible,
)

SLIDING, FULL = "sliding_attention", "full_attention"
"""Kinds of layers, and their masks among those of a decoder."""
CACHES = ("past_key_values", "layer_past", "past_key_value")


def check_positions(positions: str, core: nn.Module) -> str:
    """`positions`, where the decoder allows it.

    Raises:
        UserError: "compact" in a model whose positions have rows and columns.
    """
    if positions == "compact" and hasattr(getattr(core, "rotary_emb", None), "mrope_section"):
        raise UserError(
            "--positions compact: this model's positions are rows and columns of the image; use original"
        )
    return positions


class LayerInputs:
    """Fits a decoder's inputs to layers that see fewer tokens than entered.

    Args:
        core: the decoder.
        positions: "original" keeps the position ids of the tokens that are left, "compact" renumbers them.
    """

    def __init__(self, core: nn.Module, positions: str):
        self.core, self.positions = core, check_positions(positions, core)
        self.rotary = getattr(core, "rotary_emb", None)

    @property
    def implementation(self) -> str:
        """Of the decoder's attention, as transformers names it."""
        return self.core.config._attn_implementation or "eager"

    @property
    def masks_padding(self) -> bool:
        """Whether that takes no masks but of padding, [B, T]."""
        return "flash" in self.implementation

    def fit(self, run: Run, place: int, kept: Kept, given: Inputs) -> None:
        """Change `given`, by name, which the decoder made for all tokens that entered it."""
        ids, rope = given.get("position_ids"), given.get("position_embeddings")
        if run.is_prompt:
            rows = slots = kept.columns
            if ids is not None:
                key = ("ids", id(kept), id(ids))
                ids = given["position_ids"] = run.once(
                    key, lambda: gather_last(given["position_ids"], kept.index)
                )
        else:
            rows = torch.arange(run.length, device=kept.index.device).expand(kept.index.shape[0], -1)
            slots = rows + run.track.entered - run.length
        if self.positions == "compact" and self.rotary is not None and isinstance(rope, tuple):
            ids = ids - (kept.shift() if run.is_prompt else kept.gone[:, None])
            given["position_ids"] = ids
            given["position_embeddings"] = run.once(
                ("turned", id(kept), id(rope)), lambda: self.rotate(place, given["hidden_states"], ids)
            )
        elif run.is_prompt and isinstance(rope, tuple):
            key = ("rope", id(kept), id(rope))
            given["position_embeddings"] = run.once(
                key, lambda: tuple(gather_rope(part, kept.index) for part in rope)
            )
        cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
        mask, (window, held) = given.get("attention_mask"), _sliding(cache, place)
        keys = kept.index.shape[1] if window is None else rows.shape[1] + held
        given["attention_mask"] = run.once(
            ("mask", id(kept), id(mask), keys, window),
            lambda: self._mask(run, mask, latest(kept, keys), rows, slots, window),
        )

    def _mask(
        self, run: Run, mask: Tensor | None, seen: Kept, rows: Tensor, slots: Tensor, window: int | None
    ) -> Tensor | None:
        """The mask of one layer: `mask`, which is for the entering sequence, at what the layer sees of it."""
        if mask is not None and mask.dim() == 2:
            return gather_padding(mask, seen)
        if run.is_prompt and mask is not None:
            return gather_mask(mask, rows, seen, run.track.entered)
        if seen.valid is None and mask is None and (run.is_prompt or window is None):
            return None
        padding = _padding(run)
        padding = None if padding is None else padding.bool().gather(1, seen.columns)
        if self.masks_padding:
            return padding if seen.valid is None else seen.valid if padding is None else seen.valid & padding
        entry = run.track.entry
        if window is not None and entry is not None:
            # A window counts what left before the decoder too.
            seen = replace(seen, index=entry.index.gather(1, seen.columns))
            slots = entry.index.gather(1, slots)
        # The model sized its own mask by a layer that may have lost tokens itself.
        shown = visible(slots, seen, window)
        if padding is not None:
            shown = shown & padding[:, None, None]
        return self.as_mask(shown)

    def slides(self, mask: Any, length: int) -> int | None:
        """The window of sliding layers that `length` tokens are longer than, where the decoder is given no masks but
        `mask`, of padding, and makes its own, which count what is left; None where it is not so, or takes no others.
        """
        kinds = set(getattr(self.core.config, "layer_types", None) or (SLIDING,))
        window = getattr(self.core.config, "sliding_window", None)
        plain = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
        if self.masks_padding or not plain or SLIDING not in kinds or not kinds <= {SLIDING, FULL}:
            return None
        return window if window is not None and length > window else None

    def counting(self, rows: Tensor, seen: Kept, kept: Kept, window: int, real: Tensor | None) -> Any:
        """Masks in which a window counts what left before the decoder: one, or by kinds of layer.

        Args:
            rows: int64 [B, q], slots of the queries in the caller's sequence.
            seen: what sliding layers hold.
            kept: what the others hold.
            window: of sliding layers.
            real: the caller's padding mask [B, N] (nonzero: real), or None.
        """
        found = {}
        for name, part, reach in ((SLIDING, seen, window), (FULL, kept, None)):
            shown = visible(rows, part, reach)
            if real is not None:
                own = rows.unsqueeze(2) == part.columns.unsqueeze(1)
                padding = real.bool().gather(1, part.columns)[:, None]
                shown = shown & (padding | own).unsqueeze(1)
            found[name] = self.as_mask(shown)
        whole = self.implementation != "eager" and rows.shape[1] in (1, kept.index.shape[1])
        if whole and kept.valid is None and (real is None or bool(real.all())):
            # Where nothing is hidden, transformers hands its kernels no mask.
            found[FULL] = None
        return found if getattr(self.core.config, "layer_types", None) else found[SLIDING]

    def as_mask(self, shown: Tensor) -> Tensor:
        """What is `shown`, bool [B, 1, q, T], in the form the model's attention takes."""
        if self.implementation != "eager":
            return shown
        dtype = next(self.core.parameters()).dtype
        hidden = torch.zeros(shown.shape, dtype=dtype, device=shown.device)
        return hidden.masked_fill(~shown, hidden_value(dtype))

    def rotate(self, place: int, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary embeddings at other positions."""
        if "layer_type" in signature(self.rotary.forward).parameters:
            return self.rotary(hidden, ids, self.core.config.layer_types[place])
        return self.rotary(hidden, ids)


def latest(kept: Kept, keys: int) -> Kept:
    """The last `keys` of the tokens that are left."""
    valid = None if kept.valid is None else kept.valid[:, -keys:]
    return Kept(kept.columns[:, -keys:], valid, kept.gone)


def _padding(run: Run) -> Tensor | None:
    """The padding mask [B, T] (nonzero: real) of what entered the decoder; where its masks were made outside of it, the
    caller's.
    """
    mask, entry = run.inputs.get("attention_mask"), run.track.entry
    if run.padding is not None or not isinstance(mask, Tensor) or mask.dim() != 2:
        return run.padding
    return mask if entry is None else gather_padding(mask, entry)


def window_of(core: nn.Module, place: int) -> int | None:
    """How many tokens layer `place` of a decoder sees, itself included; None for all."""
    kinds = getattr(core.config, "layer_types", None)
    return getattr(core.config, "sliding_window", None) if not kinds or kinds[place] == SLIDING else None


def window_in(cache: Any) -> tuple[int | None, int]:
    """The window of a cache's sliding layers, None where there are none; and how many entries each of them holds."""
    layers = range(0 if cache is None else len(cache.layers))
    return next((found for place in layers if (found := _sliding(cache, place))[0] is not None), (None, 0))


def _sliding(cache: Any, place: int) -> tuple[int | None, int]:
    """The window of a layer's cache, None where it holds everything; and how many entries it holds."""
    if cache is None or place >= len(cache.layers):
        return None, 0
    layer = cache.layers[place]
    if not getattr(layer, "is_sliding", False):
        return None, 0
    return layer.sliding_window, layer.keys.shape[-2] if layer.is_initialized and layer.keys.numel() else 0
