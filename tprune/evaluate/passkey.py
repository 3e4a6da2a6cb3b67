"""Whether a language model finds a number in a context that is only in its cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from tprune.data.passkey import DEPTHS, Hidden
from tprune.models.recurrent import logits_behind


@torch.no_grad()
def retrieve(
    model: nn.Module,
    prompts: Sequence[Hidden],
    track: Callable[[Sequence[Hidden]], object] = lambda prompts: prompts,
) -> list[bool]:
    """For every prompt whether greedy decoding would give the whole answer.

    The answer is fed to the model at once: greedy decoding gives it exactly if each of its tokens is the likeliest
    behind those before it.

    Args:
        model: a causal language model, with a cache method on it or not.
        prompts: what is hidden where.
        track: wraps the prompts, for a progress bar.
    """
    device, found = next(model.parameters()).device, []
    for prompt in track(prompts):
        cache = DynamicCache(config=model.config)
        context, rest = prompt.context[None].to(device), torch.cat([prompt.question, prompt.answer[:-1]])
        logits = logits_behind(model, cache, context, logits_to_keep=1)
        if len(rest):
            logits = torch.cat([logits, logits_behind(model, cache, rest[None].to(device))], dim=1)
        said = logits[0, -len(prompt.answer) :].argmax(-1).cpu()
        found.append(bool((said == prompt.answer).all()))
    return found


def accuracy(prompts: Sequence[Hidden], found: Sequence[bool]) -> dict[str, Any]:
    """The share of keys that were found, of all and for each depth there is a prompt at."""
    by_depth: dict[int, list[bool]] = {}
    for prompt, right in zip(prompts, found, strict=True):
        by_depth.setdefault(prompt.depth, []).append(right)
    kinds = {
        f"depth {depth / (DEPTHS - 1):.0%}": sum(rights) / len(rights)
        for depth, rights in sorted(by_depth.items())
    }
    return {"accuracy": sum(found) / len(found), "accuracy_by_kind": kinds}
