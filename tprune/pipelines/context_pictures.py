"""How much of a prompt a cache or prefill method keeps, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tprune.data import text
from tprune.errors import UserError
from tprune.evaluate.context import context_length
from tprune.evaluate.pictures import Picture
from tprune.evaluate.text_view import Token, text_picture
from tprune.models.subject import Subject
from tprune.pipelines.base import Handle, Sample
from tprune.pipelines.context_handle import CacheHandle, PrefillHandle
from tprune.pipelines.context_prompts import window_length
from tprune.pipelines.llm_context import ContextPipeline
from tprune.pipelines.pictures import heading, undisturbed


def of_context(driver: ContextPipeline, subject: Subject, handle: Handle, sample: Sample) -> list[Picture]:
    """The prompt, every token with the fraction of layers and heads that keep it."""
    if sample.image is not None:
        raise UserError("--image: a language model reads text; give --prompt TEXT or --sample N")
    if subject.processor is None:
        raise UserError(f"{subject.source.name} comes without a tokenizer, and text is needed; add its files")
    ids = prompt_of(driver, subject, sample)
    if isinstance(handle, CacheHandle):
        kept, unit = kept_in_cache(subject, handle, ids), "kept by this share of layers and key-value heads"
    else:
        kept, unit = kept_in_prefill(subject, handle, ids), "processed by this share of layers"
    tokens = [Token(said, share) for said, share in zip(spelled(subject.processor, ids), kept, strict=True)]
    return [text_picture(sample.name, heading(driver, sample), unit, tokens)]


def prompt_of(driver: ContextPipeline, subject: Subject, sample: Sample) -> Tensor:
    """Token ids, int64 [T]: the context of a window, or a text of one's own."""
    tokenizer = subject.processor
    if sample.prompt is not None:
        ids = tokenizer(sample.prompt, verbose=False)["input_ids"]
        if len(ids) < 2:
            raise UserError(f"--prompt: {len(ids)} tokens are too few to keep some of; give a longer text")
        return torch.tensor(ids)
    length = window_length(subject.model, driver.recipe.length)
    found = text.windows(text.read(driver.recipe.data, "evaluation"), tokenizer, length, sample.place + 1)
    if sample.place >= len(found):
        raise UserError(f"--sample {sample.place}: the evaluation data has {len(found)} windows, from 0 on")
    return found[sample.place, : context_length(length)]


@torch.no_grad()
def kept_in_cache(subject: Subject, handle: CacheHandle, ids: Tensor) -> list[float]:
    """Per token of a prompt [T], the fraction of prunable layers and key-value heads whose cache holds it."""
    compression = handle.compression
    before, compression.kept = compression.kept, {}
    cache = DynamicCache(config=subject.model.config)
    try:
        subject.model(input_ids=ids[None].to(subject.device), past_key_values=cache, logits_to_keep=1)
        counts, heads = torch.zeros(len(ids)), 0
        for place in compression.places:
            layer = cache.layers[place]
            if layer.stored is not None:
                raise UserError(
                    "a picture shows which entries stay in their places; here they are held in another form"
                )
            slots = layer.places[0].cpu()  # [G, K]
            real = torch.ones_like(slots) if layer.valid is None else layer.valid[:1].cpu().expand_as(slots)
            counts.scatter_add_(0, slots.flatten(), real.flatten().float())
            heads += len(slots)
    finally:
        compression.kept = before
    return (counts / heads).tolist()


@torch.no_grad()
def kept_in_prefill(subject: Subject, handle: PrefillHandle, ids: Tensor) -> list[float]:
    """Per token of a prompt [T], the fraction of layers that process it."""
    with undisturbed(handle.driver) as inner:
        inner.trace = steps = []
        subject.model(input_ids=ids[None].to(subject.device), use_cache=False, logits_to_keep=1)
    depth, place = len(handle.driver.layers), torch.arange(len(ids))
    enters = torch.ones(depth, len(ids))
    for site, stands in steps:
        enters[max(0, site.layer) :] = (stands[0].cpu() == place).float()
    return enters.mean(0).tolist()


def spelled(tokenizer: Any, ids: Tensor) -> list[str]:
    """What every token says, spaces in front included."""
    said, before = [], []
    for one in ids.tolist():
        both, first = tokenizer.decode([*before, one]), tokenizer.decode(before)
        said.append(both.removeprefix(first) if both.startswith(first) else tokenizer.decode([one]))
        before = [one]
    return said
