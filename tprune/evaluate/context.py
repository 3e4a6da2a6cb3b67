"""What a pruned context is still good for: the text that follows it, scored through the pruned cache.

Of every window the first three quarters are the context, which one prefill prunes; the last quarter is scored
teacher-forced through what is left of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tprune.evaluate.perplexity import LOGITS_AT_ONCE, token_losses
from tprune.models.recurrent import logits_behind


def context_length(window: int) -> int:
    """How many tokens of a window are context: three quarters."""
    return window * 3 // 4


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of all keys and values, in whatever form, and of states."""
    return layer_bytes(cache.layers)


def layer_bytes(layers: Iterable[Any]) -> int:
    """Of some layers of a cache: vectors, and not the numbers that a method notes for each."""
    return sum(
        part.nbytes
        for layer in layers
        for part in (
            *(getattr(layer, name, None) for name in ("keys", "values", "stored")),
            *(getattr(layer, "codes", None) or ()),
            *(x for x in getattr(layer, "state", {}).values() if isinstance(x, Tensor) and x.dim() == 4),
            *(x for name in ("conv_states", "recurrent_states") for x in getattr(layer, name, {}).values()),
        )
        if part is not None
    )


@torch.no_grad()
def score_continuations(
    model: nn.Module,
    windows: Tensor,
    batch_size: int,
    track: Callable[[list[Tensor]], object] = lambda chunks: chunks,
) -> tuple[Tensor, Tensor, float]:
    """How a causal language model goes on from a context that is only in its cache.

    Args:
        model: with a cache method on it or not.
        windows: token ids, int64 [W, L].
        batch_size: at most so many windows at a time; fewer where their logits would fill the memory.
        track: wraps the batches, for a progress bar.

    Returns:
        losses float32 [W, L - C] and top-1 predictions int64 [W, L - C] of the last quarter, on the CPU, and the
        bytes of the cache per window after the context.
    """
    device = next(model.parameters()).device
    vocabulary = model.get_output_embeddings().weight.shape[0]
    length = windows.shape[1]
    context = context_length(length)
    rows = max(1, min(batch_size, LOGITS_AT_ONCE // ((length - context) * vocabulary)))
    losses, predictions, held = [], [], 0
    for chunk in track(list(windows.split(rows))):
        chunk = chunk.to(device)
        cache = DynamicCache(config=model.config)
        first = logits_behind(model, cache, chunk[:, :context], logits_to_keep=1)
        held += cache_bytes(cache)
        rest = logits_behind(model, cache, chunk[:, context:-1])
        logits = torch.cat([first[:, -1:], rest], dim=1)
        losses.append(token_losses(logits, chunk[:, context:]).cpu())
        predictions.append(logits.argmax(-1).cpu())
    return torch.cat(losses), torch.cat(predictions), held / len(windows)
