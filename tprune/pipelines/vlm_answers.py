"""Questions about images as a vision-language model is asked them, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tprune.models.feed import placed
from tprune.models.subject import Subject

LONGEST_ANSWER = 16
"""In tokens."""


def question_inputs(subject: Subject, images: Sequence[Any], asked: Sequence[str]) -> dict[str, Tensor]:
    """What the model is called with to be asked this about these images."""
    processor = subject.processor
    inputs = processor(
        images=images,
        text=[_prompt(processor, question) for question in asked],
        padding=True,
        padding_side="left",  # the answer is read behind the prompt
        return_tensors="pt",
    )
    return placed(inputs, subject.model)


def answered_inputs(
    subject: Subject, images: Sequence[Any], asked: Sequence[str], answers: Sequence[str]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What the model is called with where answers follow: the prompts, the answers, the end, padded behind them.

    Returns:
        The inputs; the answers' tokens int64 [B, n]; and which of those are real, bool [B, n].
    """
    inputs = question_inputs(subject, images, asked)
    tokenizer = subject.processor.tokenizer
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    said = [tokenizer(f" {answer}", add_special_tokens=False)["input_ids"] + end for answer in answers]
    longest = max(map(len, said))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in said])
    real = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in said])
    before = inputs["input_ids"]
    ids, real = ids.to(before.device), real.to(before.device)
    for name, value in inputs.items():
        if value.shape == before.shape:
            tail = {"input_ids": ids, "attention_mask": real}.get(name, torch.zeros_like(ids))
            inputs[name] = torch.cat([value, tail.to(value.dtype)], dim=1)
    return inputs, ids, real


def told(subject: Subject, inputs: dict[str, Tensor], longest: int) -> list[str]:
    """What the model says, greedily, at most `longest` tokens.

    By `generate` for a single one too: positions then count no padding, on which methods that read rotated keys depend.
    """
    said = subject.model.generate(**inputs, max_new_tokens=longest, do_sample=False)
    tokens = said[:, inputs["input_ids"].shape[1] :]
    return subject.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def plain(text: str) -> str:
    """An answer without case, surrounding space and the full stop."""
    return text.strip().strip(".").strip().lower()


def _prompt(processor: Any, question: str) -> str:
    """A question behind an image, as the model's own template has it."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turn = [{"role": "user", "content": content}]
        return processor.apply_chat_template(turn, add_generation_prompt=True)
    return f"{processor.image_token}\n{question}"
