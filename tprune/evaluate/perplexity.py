"""Perplexity and top-1 predictions of a language model over windows of text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

LOGITS_AT_ONCE = 1 << 26
"""Logits held in memory at a time: a vocabulary of 50,000 makes 100 MB of every 512 tokens."""


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target [B, T] under logits [B, T, V], float32 [B, T]."""
    flat = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return flat.view(targets.shape)


def perplexity(losses: Tensor) -> float:
    """exp of the mean over windows of each window's mean loss, [W, T] of equal lengths."""
    return losses.double().mean().exp().item()


@torch.no_grad()
def score_windows(
    model: nn.Module,
    windows: Tensor,
    batch_size: int,
    track: Callable[[list[Tensor]], object] = lambda chunks: chunks,
) -> tuple[Tensor, Tensor]:
    """How a causal language model does on windows of text, every token predicted from those before it.

    Args:
        model: a transformers model with a language-modelling head.
        windows: token ids, int64 [W, L].
        batch_size: at most so many windows at a time; fewer where their logits would fill the memory.
        track: wraps the batches, for a progress bar.

    Returns:
        losses float32 [W, L - 1] and top-1 predictions int64 [W, L - 1], on the CPU.
    """
    device = next(model.parameters()).device
    vocabulary = model.get_output_embeddings().weight.shape[0]
    rows = max(1, min(batch_size, LOGITS_AT_ONCE // (windows.shape[1] * vocabulary)))
    losses, predictions = [], []
    for chunk in track(list(windows.split(rows))):
        chunk = chunk.to(device)
        logits = model(input_ids=chunk, use_cache=False).logits[:, :-1]
        losses.append(token_losses(logits, chunk[:, 1:]).cpu())
        predictions.append(logits.argmax(-1).cpu())
    return torch.cat(losses), torch.cat(predictions)
