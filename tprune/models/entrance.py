"""Where a sequence enters a decoder shortened, what then follows it, and where it leaves at its full length again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tprune.core.select import mark
from tprune.errors import UserError
from tprune.models.layer_inputs import SLIDING, LayerInputs, latest, window_in
from tprune.models.run import Inputs, Run
from tprune.models.track import Kept, gather_any_mask, gather_last, restore, restored, visible

Entrance = Callable[[Run, Tensor], tuple[Tensor, Tensor, Tensor | None]]
"""What happens at `PROJECTOR`: (run, embeddings [B, N, D]) -> embeddings [B, K, D], slots [B, K], valid [B, K]."""


def shorten(run: Run, given: Inputs, entrance: Entrance, inputs: LayerInputs, positions: str) -> None:
    """A prompt: let tokens leave, and take their places out of mask and positions.

    Args:
        run: of the prompt.
        given: what the decoder is called with, by name; changed.
        entrance: what chooses.
        inputs: of the decoder's layers.
        positions: "compact" renumbers the tokens that are left, "closed" what follows an image.
    """
    mask, ids = given.get("attention_mask"), given.get("position_ids")
    given["inputs_embeds"], index, valid = entrance(run, given["inputs_embeds"])
    kept = run.track.entry = Kept.of(index, valid, run.length)
    ids = torch.arange(run.length, device=index.device)[None] if ids is None else ids
    given["position_ids"] = gather_last(ids, index)
    if positions == "compact":
        given["position_ids"] = given["position_ids"] - kept.shift()
    elif positions == "closed":
        moved, kept.closed = closing(ids, run.prunable, mark(index, valid, run.length))
        given["position_ids"] = given["position_ids"] - moved.gather(1, index)
    # Without a mask transformers takes gaps in the positions for the seams of packed sequences.
    mask = torch.ones_like(run.prunable, dtype=torch.int64) if mask is None else mask
    given["attention_mask"] = gather_any_mask(mask, index, kept, run.length)
    if positions != "compact" and (window := inputs.slides(mask, run.length)) is not None:
        given["attention_mask"] = inputs.counting(index, kept, kept, window, mask)


def closing(ids: Tensor, image: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """How far tokens move to the front for text to begin right behind the largest position that is left of an image.

    Args:
        ids: [B or 1, N], or [3 or 4, B, N] where positions have rows and columns (behind plain ones).
        image: bool [B, N], image tokens; those next to each other are of one image.
        stays: bool [B, N], what is left, at least one of every image.

    Returns:
        int64 [B, N] for the prompt, and [B, 1] for all that follows it.
    """
    place = (ids if ids.dim() == 2 else ids[-3:].amax(0)).expand(image.shape)
    number = (image & ~functional.pad(image[:, :-1], (1, 0))).cumsum(1)
    ends = [
        torch.zeros_like(functional.pad(place, (0, 1))).scatter_reduce(1, number, place * part, "amax")
        for part in (image, image & stays)
    ]
    moved = ends[0] - ends[1]
    total = moved.cumsum(1)
    behind = total.gather(1, number)
    return behind - image * moved.gather(1, number), behind[:, -1:]


def place_behind(run: Run, given: Inputs, kept: Kept, inputs: LayerInputs, positions: str) -> None:
    """Tokens behind a prompt of which the first layer has only `kept`: their masks, and their positions.

    Args:
        run: of those tokens.
        given: what the decoder is called with, by name; changed.
        kept: what is left of the prompt.
        inputs: of the decoder's layers.
        positions: "original", "compact" or "closed".

    Raises:
        UserError: a sliding window that cannot be told what left.
    """
    ids = given.get("position_ids")
    batch, device = kept.index.shape[0], kept.index.device
    rows = torch.arange(run.length, device=device).expand(batch, -1)
    if ids is None:
        ids = rows + run.start
    elif run.inputs.get("position_ids") is None:
        # The model counted from the length of a cache that is shorter than what it has seen.
        ids = ids + (run.track.length - run.track.held)
    # Where tokens left inside the decoder, every layer closes its own gaps.
    closes = positions == "compact" and run.track.entry is not None
    given["position_ids"] = ids - kept.gone[:, None] if closes else ids
    if kept.closed is not None:
        given["position_ids"] = ids - kept.closed
    mask = given.get("attention_mask")
    window = (
        inputs.slides(mask, run.track.length) if kept is run.track.entry and positions != "compact" else None
    )
    if window is None:
        given["attention_mask"] = _mask_behind(run, given, kept, rows, inputs)
        return
    # A sliding cache ends with the latest of what is left.
    slides, held = window_in(given.get("past_key_values"))
    seen = kept if slides is None else latest(kept, held + run.length)
    given["attention_mask"] = inputs.counting(rows + run.start, seen, kept, window, mask)


def _mask_behind(run: Run, given: Inputs, kept: Kept, rows: Tensor, inputs: LayerInputs) -> Any:
    """The decoder's masks for tokens behind a prompt, `rows` int64 [B, q] of them, and what is left of it.

    Raises:
        UserError: a sliding window is shorter than what is left, and masks do not say which queries see a key.
    """
    mask = given.get("attention_mask")
    window, held = window_in(given.get("past_key_values"))
    windowed = window is not None and isinstance(mask, dict) and SLIDING in mask
    if windowed and inputs.masks_padding and kept.index.shape[1] > window:
        raise UserError(
            "this decoder's sliding windows are shorter than what is left of the prompt: that takes "
            "attn_implementation=sdpa or eager"
        )
    if not windowed or inputs.masks_padding:
        return gather_any_mask(mask, rows, kept, run.track.length)
    # A window counts what left, as it does in the prompt; its cache ends with the latest of what is left, and where
    # that is less than a window transformers makes no mask at all.
    seen, real = latest(kept, held + run.length), run.inputs.get("attention_mask")
    shown = visible(rows + run.start, seen, window)
    if isinstance(real, Tensor) and real.dim() == 2:
        shown = shown & real.bool().gather(1, seen.columns)[:, None, None]
    others = {name: part for name, part in mask.items() if name != SLIDING}
    return gather_any_mask(others, rows, kept, run.track.length) | {SLIDING: inputs.as_mask(shown)}


def fill_up(output: Any, kept: Kept, length: int, full: Tensor | None = None) -> Any:
    """A module's output with its hidden states at the slots of what is `kept` of `length`; elsewhere those of `full`
    [B, length, D], or zeros.
    """

    def filled(hidden: Tensor) -> Tensor:
        if full is None:
            return restore(hidden, kept.index, kept.valid, length)
        return restored(hidden, kept, full)

    if isinstance(output, Tensor):
        return filled(output)
    if isinstance(output, tuple):
        return (filled(output[0]), *output[1:])
    output.last_hidden_state = filled(output.last_hidden_state)
    return output
