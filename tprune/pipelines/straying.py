"""How far an encoder strays from its own ways with some of its structure gone, on the calibration sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn

from tprune.core.weights import StructureEdit
from tprune.methods.weight_view import Trajectory
from tprune.models import units
from tprune.models.calibrate import Stream
from tprune.models.halves import masked
from tprune.models.standing_in import answering
from tprune.pipelines.journal import Journal
from tprune.pipelines.removal import Questions
from tprune.progress import Progress


class Straying(Questions):
    """What a measure says of trajectories with edits, as `ModelView.strayed_with` gives it.

    What enters every block of the dense model is kept, so that a candidate runs from the first block on that it edits.

    Args:
        stream: the calibration sequences before the first block; it stays there.
    """

    def __init__(
        self, stream: Stream, journal: Journal, progress: Progress, max_minutes: float | None = None
    ):
        super().__init__(journal, progress, max_minutes)
        self.stream, self.decoder = stream, stream.decoder
        self.entering: list[Tensor] = []

    @torch.no_grad()
    def __call__(
        self,
        candidates: Sequence[Sequence[StructureEdit]],
        measure: Callable[[Trajectory, Trajectory], Tensor],
    ) -> Tensor:
        """What `measure` says of the dense trajectory and of each candidate's, float64 [C, ...].

        Raises:
            UserError: the time is up.
        """
        return self.answer(lambda: self._measure(candidates, measure))

    def told(self, found: Tensor) -> str:
        """How many were looked at: which of them is best is the method's affair."""
        return f"{len(found)} candidates seen"

    def _measure(
        self,
        candidates: Sequence[Sequence[StructureEdit]],
        measure: Callable[[Trajectory, Trajectory], Tensor],
    ) -> Tensor:
        dense, found = self.dense, []
        for edits in self.progress.track(candidates, self.step):
            with masked(self.decoder, edits):
                found.append(measure(dense, self._from(min(edit.block for edit in edits))))
        return torch.stack(found).double().cpu()

    @cached_property
    def dense(self) -> Trajectory:
        """The whole one of the dense model; what enters its blocks is kept on the way."""
        self.entering = [self.stream.hidden]
        for index in range(len(self.decoder.blocks) - 1):
            parts = self.entering[index].split(self.stream.rows)
            self.entering.append(torch.cat([self.stream.run(index, x) for x in parts]))
        return self._from(0)

    def _from(self, first: int) -> Trajectory:
        """The trajectory of the model as it stands, from block `first` on."""
        blocks = range(first, len(self.decoder.blocks))
        answers: list[Tensor] = []
        with self._watching(blocks) as features:
            for x, tokens in zip(
                self.entering[first].split(self.stream.rows),
                self.stream.tokens.split(self.stream.rows),
                strict=True,
            ):
                for index in blocks:
                    x = self.stream.run(index, x)
                answers += self._answers(x, tokens)
        found = {index: torch.cat(parts) for index, parts in features.items()}
        return Trajectory(found, torch.cat(answers) if answers else None)

    def _answers(self, hidden: Tensor, tokens: Tensor) -> list[Tensor]:
        """Logits of the last hidden states of a batch; none of an encoder without classes."""
        model = self.decoder.model
        if not hasattr(model, "classifier"):
            return []
        with answering(self.decoder, hidden):
            return [model(input_ids=tokens.to(hidden.device)).logits.float()]

    @contextmanager
    def _watching(self, blocks: Sequence[int]) -> Iterator[dict[int, list[Tensor]]]:
        """What the last projections of these blocks' MLPs put out from now on, batch by batch."""
        found: dict[int, list[Tensor]] = {index: [] for index in blocks}

        def keeping(index: int) -> Callable[[nn.Module, tuple, Tensor], None]:
            return lambda module, arguments, out: found[index].append(out.flatten(0, -2).float())

        with ExitStack() as stack:
            for index in blocks:
                reader = units.site(self.decoder, index, "channels").reader
                stack.enter_context(reader.register_forward_hook(keeping(index)))
            yield found
