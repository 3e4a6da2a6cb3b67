"""MMTok keeps the image tokens that cover both the question's words and the image itself best.

A token covers a word, or another patch, as well as it resembles it; the greedy choice for maximal coverage weighs both
modalities in one matrix.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from tprune.core import cosine, greedy, select
from tprune.core.budget import PROJECTOR, Stage
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod

PROMPTS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
"""What benchmarks put behind their questions."""
STOP_WORDS = (
    "a an the i you he she it we they who what which when where why how be been being is are was were do does did "
    "have has had and or but so if then at by for from into onto to upon with question answer"
)
"""Words that nothing in an image answers to."""


@dataclass(frozen=True)
class MMTok(TokenMethod):
    """Greedy coverage of text and image by the tokens of every crop."""

    paper = Paper(
        title="MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs",
        venue="ICLR",
        year=2026,
        arxiv="2508.18264",
        code="Ironieser/MMTok",
        checked="code",
        notes="The text is all that stands behind the last image; the authors are given the question by itself, and "
        "use text_temperature=0.01 and keywords=false on Qwen2.5-VL. Words are looked at where the model has its "
        "tokenizer beside it. The optional draft answer of a small model is not part of this.",
    )
    reads = ("encoder",)
    positions = "compact"
    native = ("ratio",)
    unit = "crop"

    ratio: float = param(0.1112, "fraction of every crop's tokens that stays: 64 of 576", low=0, high=1)
    alpha: float = param(0.5, "weight of covering the image beside covering the text", low=0)
    text_temperature: float = param(0.02, "temperature of the softmax from words to image tokens", low=1e-4)
    image_temperature: float = param(0.2, "temperature of the softmax from patches to patches", low=1e-4)
    keywords: bool = param(True, "words without a picture (articles, pronouns, question words) do not count")

    def stages(self, shape, knob):
        """k = round(r · N), at least one."""
        keep = self.ratio if knob is None else knob
        return [Stage(PROJECTOR, max(1, round(keep * shape.tokens)))]

    def reduce(self, site, view, count, memory):
        """P from words to tokens in the decoder's space, Q from patches to patches in the tower's; cover both."""
        text = view.signal("text")
        if self.keywords:
            text = text.signal("reworded")(keywords)
        patches = view.pool(view.encoder.hidden[:, view.encoder.prefix :])
        words = cosine.between(text.hidden, view.hidden).div_(self.text_temperature)
        image = cosine.among(patches).div_(self.image_temperature)
        allowed = None if view.whole else view.prunable
        words = shares(words, text.real, allowed)
        cover = torch.cat([words, shares(image, view.prunable, allowed, self.alpha)], dim=1)
        order = greedy.coverage(cover, int(torch.as_tensor(count).max()), allowed)
        index, valid = select.keep_first(order, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)


def shares(logits, rows_real, columns_real, weight=1.0):
    """softmax of `logits` [B, R, N], which are lost, over the columns, times weight / rows: float32 [B, R, N].

    What is not real (bool [B, R], [B, N] or None where all are) takes no part.
    """
    part = weight * rows_real / rows_real.sum(1, keepdim=True).clamp_min(1)
    if columns_real is not None:
        logits.masked_fill_(~columns_real.unsqueeze(1), -torch.inf)
    return logits.softmax(dim=2).mul_(part.unsqueeze(2))


def keywords(text):
    """The words of a question that can be seen; all of it where there is none."""
    for prompt in PROMPTS:
        text = text.replace(prompt, "")
    stop = STOP_WORDS.split()
    words = [word for word in re.findall(r"\w+", text) if word.lower() not in stop]
    return " ".join(words) or text
