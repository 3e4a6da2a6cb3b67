"""Questions about images as a vision-language model is asked them, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

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
        return_tensors="pt",
    )
    parameter = next(subject.model.parameters())
    return {
        name: value.to(parameter.device, parameter.dtype)
        if value.is_floating_point()
        else value.to(parameter.device)
        for name, value in inputs.items()
    }


def told(subject: Subject, inputs: dict[str, Tensor], longest: int) -> list[str]:
    """What the model says, greedily, at most `longest` tokens."""
    if longest == 1:
        tokens = subject.model(**inputs, logits_to_keep=1).logits[:, -1:].argmax(-1)
    else:
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
