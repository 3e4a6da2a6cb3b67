"""How far a pruned language model is from the dense one: the divergence of its predictions on calibration sequences."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from tprune.core.divergence import divergence, likeliest
from tprune.core.weights import StructureEdit
from tprune.evaluate.perplexity import logits_in_parts
from tprune.models import shapes
from tprune.models.blocks import find_decoder
from tprune.models.calibrate import Stream
from tprune.models.halves import masked
from tprune.models.standing_in import answering
from tprune.pipelines.journal import Journal
from tprune.pipelines.removal import Questions
from tprune.progress import Progress

Dense = tuple[Tensor, Tensor | None]
"""Logits of the dense model for a run of positions, and whose they are (`likeliest`)."""


@dataclass(frozen=True)
class Sample:
    """Calibration sequences, whole but for the last.

    Attributes:
        rows: which.
        lengths: how many tokens of each.
    """

    rows: list[int]
    lengths: list[int]


def draw(count: int, length: int, tokens: int, random: Random) -> Sample:
    """Different sequences with `tokens` tokens together, of `count` with `length` each; all where there are fewer.

    A single token at the end is left out: it predicts nothing, and a loss over none is no number.
    """
    tokens = min(tokens, count * length)
    tokens -= tokens % length == 1
    rows = random.sample(range(count), -(-tokens // length))
    return Sample(rows, [min(length, tokens - place * length) for place in range(len(rows))])


class Divergence(Questions):
    """Divergences with edits. The dense model runs once; its last hidden states are kept, from which its predictions
    are made again for every batch of every question, those of no other batch beside them.

    Args:
        stream: the calibration sequences before the first block of the dense model.
        top: how many of the dense model's likeliest tokens count; None for all.
        rate: learning rate of the training of candidates.
    """

    asks_for = "divergence"

    def __init__(
        self,
        stream: Stream,
        journal: Journal,
        progress: Progress,
        max_minutes: float | None,
        top: int | None,
        rate: float,
    ):
        super().__init__(journal, progress, max_minutes)
        self.stream, self.top, self.rate = stream, top, rate
        self._dense: Tensor | None = None

    @torch.no_grad()
    def __call__(
        self, candidates: Sequence[Sequence[StructureEdit]], sample: Sample, training: Sample
    ) -> Tensor:
        """KL from the dense model, mean over the tokens of `sample`, of each candidate: float64 [C].

        Args:
            candidates: edits, with the new weights that they bring.
            sample: what is looked at; the last token of a sequence predicts nothing.
            training: what each candidate is trained on before, one sequence a step; it forgets that afterwards.

        Raises:
            UserError: the time is up.
        """
        return self.answer(lambda: self._measure(candidates, sample, training))

    def _measure(
        self, candidates: Sequence[Sequence[StructureEdit]], sample: Sample, training: Sample
    ) -> Tensor:
        total = torch.zeros(len(candidates), dtype=torch.float64)
        if training.rows:
            for place, edits in enumerate(self.progress.track(candidates, self.step)):
                total[place] = self._over(sample, self._trained(edits, training))
        else:
            count = -(-len(sample.rows) // self.stream.rows)
            for x, ids, dense, counted in self.progress.track(self._batches(sample), self.step, count):
                for place, edits in enumerate(candidates):
                    total[place] += self._summed(dense, self._with(edits, x, ids), counted)
        return total / sum(length - 1 for length in sample.lengths)

    def _over(self, sample: Sample, model: torch.nn.Module) -> float:
        """The divergence of another model, summed over a sample."""
        return sum(
            self._summed(dense, logits_in_parts(model, ids), counted)
            for _, ids, dense, counted in self._batches(sample)
        )

    def _batches(self, sample: Sample) -> Iterator[tuple[Tensor, Tensor, list[Dense], Tensor]]:
        """Of a few sequences at a time: what enters the first block, the tokens, the dense logits in parts, and which
        predictions count, bool [B, L - 1].
        """
        stream = self.stream
        for rows, lengths in zip(
            torch.tensor(sample.rows).split(stream.rows),
            torch.tensor(sample.lengths).split(stream.rows),
            strict=True,
        ):
            x = stream.hidden[rows]
            ids = stream.tokens[rows].to(x.device)
            with answering(stream.decoder, self.dense()[rows]):
                parts = [
                    likeliest(logits, self.top) for _, logits in logits_in_parts(stream.decoder.model, ids)
                ]
            counted = torch.arange(ids.shape[1] - 1) < lengths.unsqueeze(1) - 1
            yield x, ids, parts, counted.to(x.device)

    def dense(self) -> Tensor:
        """What leaves the dense model's last block, [N, L, D]."""
        if self._dense is None:
            parts = []
            for x in self.stream.hidden.split(self.stream.rows):
                for index in range(len(self.stream.decoder.blocks)):
                    x = self.stream.run(index, x)
                parts.append(x)
            self._dense = torch.cat(parts)
        return self._dense

    def _with(self, edits: Sequence[StructureEdit], x: Tensor, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The logits of a candidate, in parts."""
        decoder = self.stream.decoder
        with masked(decoder, edits):
            for index in range(len(decoder.blocks)):
                x = self.stream.run(index, x)
        with answering(decoder, x):
            yield from logits_in_parts(decoder.model, ids)

    def _summed(self, dense: list[Dense], parts: Iterator[tuple[int, Tensor]], counted: Tensor) -> float:
        total = 0.0
        for (whole, index), (first, logits) in zip(dense, parts, strict=True):
            found = divergence(whole, logits, index)
            total += (found * counted[:, first : first + found.shape[1]]).double().sum().item()
        return total

    def _trained(self, edits: Sequence[StructureEdit], training: Sample) -> torch.nn.Module:
        """A copy of the model with the edits, trained; the model itself stays as it is."""
        model = copy.deepcopy(self.stream.decoder.model)
        shapes.apply(find_decoder(model), list(edits))
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.rate)
        with torch.enable_grad():
            model.requires_grad_(True)
            for row, length in zip(training.rows, training.lengths, strict=True):
                ids = self.stream.tokens[row : row + 1, :length].to(self.stream.hidden.device)
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return model
