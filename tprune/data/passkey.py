"""Passkey retrieval: a number hidden somewhere in a text, which a question behind the text asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tprune.data.text import SEPARATOR, Text
from tprune.errors import UserError

DEPTHS = 12
"""Places of the needle, at equal steps from the beginning of the text to its end."""
PROMPTS = 108
"""Prompts in an evaluation: as many at each depth."""
SOURCES = {"passkey": False, "passkey-inside": True}
"""Names under which `--data` asks for it, and whether the question is part of what is pruned."""

NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"


@dataclass(frozen=True, eq=False)
class Hidden:
    """One prompt.

    Attributes:
        context: int64 [C], what the cache holds when it is pruned.
        question: int64 [Q], what comes behind; empty where the question is part of the context.
        answer: int64 [A].
        depth: where the needle is, 0 to DEPTHS - 1.
    """

    context: Tensor
    question: Tensor
    answer: Tensor
    depth: int


def hide(text: Text, tokenizer: Any, length: int, count: int, inside: bool, seed: int) -> list[Hidden]:
    """`count` prompts of `length` tokens with the question, each with its own key and its own stretch of text.

    Args:
        text: what the needles are hidden in; stretches of it follow one another, and begin again at its end.
        tokenizer: of the model.
        length: of context and question together; the answer comes behind.
        count: how many; the depths take turns.
        inside: whether the question is part of the context.
        seed: of the keys, numbers of five digits.

    Raises:
        UserError: too few tokens for needle and question, or too little text.
    """

    def encode(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]

    tokens, question = encode(SEPARATOR.join(text.documents)), encode(QUESTION)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for place, key in enumerate(torch.randint(10_000, 100_000, (count,), generator=generator).tolist()):
        needle = encode(NEEDLE.format(key=key))
        room = length - len(needle) - len(question)
        if room < DEPTHS or len(tokens) < room:
            raise UserError(
                f"--length {length}: a pass key and its question need {length - room} tokens, at least {DEPTHS} of "
                f"text beside them, and the text has {len(tokens)}"
            )
        start = place * room % (len(tokens) - room + 1)
        hay, depth = tokens[start : start + room], place % DEPTHS
        at = depth * room // (DEPTHS - 1)
        context, behind = [*hay[:at], *needle, *hay[at:]], question
        if inside:
            context, behind = context + question, []
        parts = (torch.tensor(part, dtype=torch.int64) for part in (context, behind, encode(f" {key}")))
        found.append(Hidden(*parts, depth))
    return found
