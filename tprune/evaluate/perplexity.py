"""Perplexity and top-1 predictions of a language model over windows of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from tprune.models.blocks import has_encoder
from tprune.models.encoder_decoder import fed
from tprune.models.replaced import replaced

LOGITS_AT_ONCE = 1 << 24
"""Logits held in memory at a time, 64 MB in float32: a vocabulary of 50,000 makes as many of 340 tokens."""
TOKENS_AT_ONCE = 4096
"""At most so many tokens go through the model together, and at least one window."""


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
    """How a language model does on windows of text, every token predicted from those before it.

    Where an encoder reads the first half of a window, T are the tokens of the second; elsewhere all but the first.

    Args:
        model: a transformers model with a language-modelling head.
        windows: token ids, int64 [W, L].
        batch_size: at most so many windows at a time; fewer where they are more than `TOKENS_AT_ONCE` tokens.
        track: wraps the batches, for a progress bar.

    Returns:
        losses float32 [W, T] and top-1 predictions int64 [W, T], on the CPU.
    """
    device = next(model.parameters()).device
    rows = max(1, min(batch_size, TOKENS_AT_ONCE // windows.shape[1]))
    losses, predictions = [], []
    for chunk in track(list(windows.split(rows))):
        found = score_batch(model, chunk.to(device))
        losses.append(found[0])
        predictions.append(found[1])
    return torch.cat(losses), torch.cat(predictions)


def score_batch(model: nn.Module, tokens: Tensor, at_once: int | None = None) -> tuple[Tensor, Tensor]:
    """Losses float32 [B, T] and top-1 predictions int64 [B, T] of tokens int64 [B, L], on the CPU.

    `at_once` as `logits_in_parts` has it.
    """
    parts = []
    for first, logits in logits_in_parts(model, tokens, at_once):
        targets = tokens[:, first + 1 : first + 1 + logits.shape[1]]
        parts.append((token_losses(logits, targets).cpu(), logits.argmax(-1).cpu()))
    return torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 1)


def logits_in_parts(
    model: nn.Module, tokens: Tensor, at_once: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """The logits behind all tokens but the last, or those that an encoder reads, a run of positions at a time.

    Its stacks run once; what the decoder made of a part is handed to the model's own forward, so that what comes
    behind it (scaling, soft caps) is the model's own.

    Args:
        model: a transformers model with a language-modelling head.
        tokens: int64 [B, L].
        at_once: so many logits in memory at a time, `LOGITS_AT_ONCE` by default, and at least those of one position.

    Yields:
        The first position of the part, and its logits [B, positions, V].
    """
    pair = has_encoder(model)
    first = tokens.shape[1] // 2 - 1 if pair else 0
    count = tokens.shape[1] - 1 - first
    given, vocabulary = fed(model, tokens), model.get_output_embeddings().weight.shape[0]
    width = max(1, (at_once or LOGITS_AT_ONCE) // (len(tokens) * vocabulary))
    if width >= count:
        yield first, model(**given, use_cache=False).logits[:, :count]
        return
    with ExitStack() as stack:
        part = stack.enter_context(_run_once(model.get_decoder()))
        if pair:
            stack.enter_context(_run_once(model.get_encoder()))
        for start in range(0, count, width):
            part[:] = [slice(start, min(start + width, count))]
            yield first + start, model(**given, use_cache=False).logits


@contextmanager
def _run_once(module: nn.Module) -> Iterator[list[slice]]:
    """`module` computes at its first call, and answers with the same output from then on.

    Yields:
        Which of its last hidden states it answers with, all where the list is empty.
    """
    computed, outputs, parts = module.forward, [], []

    def forward(*positional: object, **named: object) -> object:
        if not outputs:
            outputs.append(computed(*positional, **named))
        found = copy(outputs[0])
        for part in parts:
            found.last_hidden_state = found.last_hidden_state[:, part]
        return found

    with replaced(module, forward):
        yield parts
