"""What a language model loses with some of its blocks: its loss without them, on the calibration sequences."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from tprune.evaluate.perplexity import logits_in_parts, token_losses
from tprune.models.calibrate import Stream, answering
from tprune.pipelines.journal import Journal
from tprune.progress import Progress


class Removal:
    """Losses without blocks, as `ModelView.losses_without` gives them.

    What enters a candidate is the same for all that come later, so the model runs up to it once, and without it only
    from there on: half the work of a whole pass per candidate. Answers are kept in the journal in the order they are
    asked for; the same search, started again, finds them there.

    Args:
        stream: the calibration sequences before the first block; it stays there.
        journal: of the answers.
        progress: a bar per question.
    """

    def __init__(self, stream: Stream, journal: Journal, progress: Progress):
        self.stream, self.journal, self.progress = stream, journal, progress
        self.asked = 0

    @torch.no_grad()
    def __call__(self, gone: Collection[int], candidates: Sequence[int]) -> Tensor:
        """Mean loss per token without `gone` and each of `candidates`, float64 [C]."""
        known = self.journal.read(self.asked)
        if known is None:
            known = {"losses": self._measure(set(gone), list(candidates))}
            self.journal.write(self.asked, known)
        self.asked += 1
        return known["losses"]

    def _measure(self, gone: set[int], candidates: list[int]) -> Tensor:
        stream = self.stream
        alive = [index for index in range(len(stream.decoder.blocks)) if index not in gone]
        total = torch.zeros(len(candidates), dtype=torch.float64)
        pairs = list(zip(stream.hidden.split(stream.rows), stream.tokens.split(stream.rows), strict=True))
        for x, tokens in self.progress.track(pairs, f"without {len(gone) + 1} blocks"):
            for place, index in enumerate(alive):
                if index in candidates:
                    total[candidates.index(index)] += self._loss(x, alive[place + 1 :], tokens)
                x = stream.run(index, x)
        return total / (stream.tokens.shape[0] * (stream.tokens.shape[1] - 1))

    def _loss(self, x: Tensor, blocks: Sequence[int], tokens: Tensor) -> float:
        """Summed over the tokens, of the hidden states `x` sent through `blocks`."""
        for index in blocks:
            x = self.stream.run(index, x)
        tokens = tokens.to(x.device)
        with answering(self.stream.decoder, x):
            return sum(
                token_losses(logits, tokens[:, first + 1 : first + 1 + logits.shape[1]]).double().sum().item()
                for first, logits in logits_in_parts(self.stream.decoder.model, tokens)
            )
