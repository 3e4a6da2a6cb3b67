"""What a language model loses with some of its structure: its loss without it, on the calibration sequences."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tprune.core.weights import StructureEdit
from tprune.errors import UserError
from tprune.evaluate.perplexity import logits_in_parts, token_losses
from tprune.models.calibrate import Stream
from tprune.models.halves import masked
from tprune.models.standing_in import answering
from tprune.pipelines.journal import Journal
from tprune.progress import Progress


class Questions:
    """What a search asks, in order: answers are kept in a journal, where the same search, started again, finds them.

    Args:
        journal: of the answers.
        progress: a bar per question, and a line when it is answered.
        max_minutes: after so much time no further question is measured; at least one is.
    """

    asks_for = "loss"

    def __init__(self, journal: Journal, progress: Progress, max_minutes: float | None = None):
        self.journal, self.progress, self.max_minutes = journal, progress, max_minutes
        self.asked = self.measured = 0
        self.started = time.monotonic()

    def answer(self, measure: Callable[[], Tensor]) -> Tensor:
        """What `measure` finds for every candidate, float64 [C]; or what it found at this point before.

        Raises:
            UserError: the time is up.
        """
        known = self.journal.read(self.asked)
        if known is None:
            self._check_time()
            known = {"losses": measure()}
            self.journal.write(self.asked, known)
            self.measured += 1
            self.progress.say(
                f"{self.step}: {self.told(known['losses'])}, {self._minutes():.1f} minutes so far"
            )
        self.asked += 1
        return known["losses"]

    def told(self, found: Tensor) -> str:
        """An answer in words."""
        return f"the best of {len(found)} has a {self.asks_for} of {found.min():.4f}"

    @property
    def step(self) -> str:
        """What the next question is called."""
        return f"search, step {self.asked + 1}"

    def _minutes(self) -> float:
        return (time.monotonic() - self.started) / 60

    def _check_time(self) -> None:
        if self.max_minutes is not None and self.measured and self._minutes() >= self.max_minutes:
            raise UserError(
                f"--max-minutes {self.max_minutes:g}: the search stopped behind step {self.asked}; what it found is "
                "kept, and the same command goes on there"
            )


class Removal(Questions):
    """Losses with edits, as `ModelView.losses_with` gives them.

    What enters the first block that a candidate edits is the same for all candidates, so the model runs up to it once,
    and with the candidate only from there on: half the work of a whole pass per candidate.

    Args:
        stream: the calibration sequences before the first block; it stays there.
        known: losses by what they are of (`fingerprint`), to which those measured here are added: other searches in the
            same dense model, such as at other budgets, find them there.
    """

    def __init__(
        self,
        stream: Stream,
        journal: Journal,
        progress: Progress,
        max_minutes: float | None = None,
        known: dict[bytes, float] | None = None,
    ):
        super().__init__(journal, progress, max_minutes)
        self.stream = stream
        self.known = {} if known is None else known

    @torch.no_grad()
    def __call__(
        self, made: Sequence[StructureEdit], candidates: Sequence[Sequence[StructureEdit]]
    ) -> Tensor:
        """Mean loss per token with `made` and each of `candidates`, float64 [C].

        Raises:
            UserError: the time is up.
        """
        return self.answer(lambda: self._look_up(made, candidates))

    def _look_up(
        self, made: Sequence[StructureEdit], candidates: Sequence[Sequence[StructureEdit]]
    ) -> Tensor:
        """The losses, of which only those are measured that nobody has asked for before."""
        names = [fingerprint(self.stream.tokens, [*made, *candidate]) for candidate in candidates]
        new = [place for place, name in enumerate(names) if name not in self.known]
        if new:
            losses = self._measure(made, [candidates[place] for place in new])
            self.known.update(zip([names[place] for place in new], losses.tolist(), strict=True))
        return torch.tensor([self.known[name] for name in names], dtype=torch.float64)

    def _measure(
        self, made: Sequence[StructureEdit], candidates: Sequence[Sequence[StructureEdit]]
    ) -> Tensor:
        stream = self.stream
        depth = len(stream.decoder.blocks)
        first = [min((edit.block for edit in candidate), default=0) for candidate in candidates]
        total = torch.zeros(len(candidates), dtype=torch.float64)
        pairs = list(zip(stream.hidden.split(stream.rows), stream.tokens.split(stream.rows), strict=True))
        with masked(stream.decoder, made):
            for x, tokens in self.progress.track(pairs, self.step):
                for index in range(max(first) + 1):
                    for place in (place for place, at in enumerate(first) if at == index):
                        with masked(stream.decoder, candidates[place]):
                            total[place] += self._loss(x, range(index, depth), tokens)
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


def fingerprint(tokens: Tensor, edits: Sequence[StructureEdit]) -> bytes:
    """What tells the loss on `tokens` with these edits from others; their order is none of it."""
    return _digest("", [tokens], sorted(_of_edit(edit) for edit in edits))


def _of_edit(edit: StructureEdit) -> bytes:
    tensors = [
        (f"{field}.{name}", tensor)
        for field in ("keep", "bias", "weight")
        for name, tensor in sorted(getattr(edit, field).items())
    ]
    names = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors]
    told = repr((edit.block, sorted(edit.gone), edit.shared, names))
    return _digest(told, [tensor for _, tensor in tensors], [])


def _digest(told: str, tensors: Sequence[Tensor], parts: Sequence[bytes]) -> bytes:
    digest = hashlib.sha256(told.encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    for part in parts:
        digest.update(part)
    return digest.digest()
