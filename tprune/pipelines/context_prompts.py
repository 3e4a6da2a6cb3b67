"""Prompts of a language model: how long they are, what of them may leave, and random ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tprune.errors import UserError
from tprune.models.run import Inputs

WINDOW = 2048


def prompt_tokens(inputs: Inputs) -> Tensor | None:
    """The tokens of a prompt that may leave, bool [B, N]: all but padding and each row's last."""
    tokens = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
    batch, length = tokens.shape[:2]
    mask = inputs.get("attention_mask")
    real = tokens.new_ones(batch, length, dtype=torch.bool) if mask is None else mask.bool()
    last = real.flip(1).cumsum(1).flip(1) == 1
    return real & ~(last & real)


def window_length(model: nn.Module, asked: int | None) -> int:
    """Tokens per window: as asked, else 2,048 or what the model has positions for.

    Raises:
        UserError: more than the model has positions for, or too few to split.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if asked is None:
        return min(WINDOW, limit or WINDOW)
    if limit and asked > limit:
        raise UserError(f"--length {asked}: this model has {limit} positions; ask for no more")
    if asked < 8:
        raise UserError(f"--length {asked}: a window is three quarters context; expected at least 8 tokens")
    return asked


def noise(model: nn.Module, length: int, seed: int) -> Tensor:
    """One row of token ids drawn from the seed, int64 [1, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.get_input_embeddings().weight.shape[0], (1, length), generator=generator)
