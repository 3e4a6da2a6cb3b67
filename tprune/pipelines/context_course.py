"""Language models and text, as a fit wants them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tprune.core.budget import Stage
from tprune.data.text import Sequences
from tprune.evaluate.context import context_length
from tprune.methods.cache import CacheMethod
from tprune.methods.fit import Fit
from tprune.methods.tokens import Shape, TokenMethod
from tprune.models.cache_fit import CacheFitDriver, cache_shape
from tprune.models.decoder_fit import DecoderFitDriver, Learning
from tprune.models.run import Inputs
from tprune.models.subject import Subject
from tprune.pipelines.course import Course
from tprune.pipelines.fit_loop import Batches


class ContextCourse(Course):
    """Learns from text: what comes next, or what the model computes on the way.

    A token method has as its prompt what a window's context is where it is measured; what follows it stays whole.

    Args:
        method: which is fitted.
        subject: the model.
        data: windows of text.
    """

    labelled = True
    unit = "sequences"

    def __init__(self, method: CacheMethod | TokenMethod, subject: Subject, data: Sequences):
        self.model, self.data = subject.model, data
        if isinstance(method, CacheMethod):
            self.shape = cache_shape(self.model, method.id if "inputs" in method.reads else None)
        else:
            depth = self.model.config.get_text_config(decoder=True).num_hidden_layers
            self.shape = Shape(depth, context_length(data.tokens.shape[1]) - 1)
        self.answers = True
        self.running: DecoderFitDriver | None = None

    def lessons(self, size: int, seed: int, share: tuple[int, int] = (0, 1)) -> Batches:
        """Windows, and the tokens that follow theirs."""
        return Batches(self.data, None, size, seed, share, self.collated)

    def samples(self, size: int, seed: int) -> Batches:
        """The same."""
        return self.lessons(size, seed)

    def collated(self, samples: Sequence[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
        """int64 [b, L], and what is said after each but the last, [b · (L - 1)]."""
        tokens = torch.stack([tokens for tokens, _ in samples]).to(self.device)
        return tokens, tokens[:, 1:].flatten()

    def outputs(self, inputs: Tensor) -> Tensor:
        """Logits of what comes next, [b · (L - 1), V]; the last hidden states where nobody asks for these."""
        if self.running is not None:
            self.running.answers = behind(inputs, context_length(inputs.shape[1]))
        if not self.answers:
            return self.model.get_decoder()(input_ids=inputs, use_cache=False).last_hidden_state
        return self.model(input_ids=inputs, use_cache=False).logits[:, :-1].flatten(0, 1).float()

    def driver(
        self, method: CacheMethod | TokenMethod, fit: Fit, seed: int
    ) -> CacheFitDriver | DecoderFitDriver:
        """`fit` beside the attention, or between the layers."""
        self.answers = fit.answers
        if isinstance(method, CacheMethod):
            return CacheFitDriver(self.model, method, fit)

        def stages(tokens: int) -> list[Stage]:
            return [Stage(site, tokens) for site in fit.sites]

        self.running = DecoderFitDriver(self.model, Learning(method, fit), leaving, stages)
        return self.running


def behind(tokens: Tensor, count: int) -> Tensor:
    """Where in `tokens` [B, N] what follows the first `count` is: bool [B, N]."""
    place = torch.arange(tokens.shape[1], device=tokens.device)
    return (place >= count).expand(tokens.shape)


def leaving(inputs: Inputs) -> Tensor:
    """What of a window's prompt may leave, bool [B, N]: all but its last token."""
    tokens = inputs["input_ids"]
    return ~behind(tokens, context_length(tokens.shape[1]) - 1)
