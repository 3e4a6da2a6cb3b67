"""Pruning of matrices that are chosen together, in rounds; the journal holds what the last one left."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tprune.core.weights import WeightEdit
from tprune.errors import UserError
from tprune.methods.weights import WeightBudget
from tprune.methods.whole import WholeMethod
from tprune.models import masks
from tprune.models.blocks import Decoder, Matrix
from tprune.models.curvature import moments
from tprune.pipelines.journal import Journal
from tprune.pipelines.stream import look
from tprune.progress import Progress

DONE = "rounds"
"""Beside the edits in the journal: how many rounds made them."""


class WholePruner:
    """One run of a method of scope "whole" over a decoder.

    Attributes:
        decoder: edited in place.
        method, budget: what is done.
        tokens: int64 [N, L], the calibration sequences.
    """

    def __init__(
        self,
        decoder: Decoder,
        method: WholeMethod,
        budget: WeightBudget,
        tokens: Tensor,
        progress: Progress,
    ):
        self.decoder, self.method, self.budget = decoder, method, budget
        self.tokens, self.progress = tokens, progress

    def run(self, journal: Journal) -> dict[str, Tensor]:
        """All rounds. Returns the record of all edits."""
        blocks = range(len(self.decoder.blocks))
        matrices = [matrix for index in blocks for matrix in self.decoder.matrices(index)]
        rounds = self.method.rounds()
        record = journal.read(0) or {}
        done = int(record.pop(DONE)) if record else 0
        masks.replay(matrices, record)
        for index in self.progress.track(range(done, rounds), "pruning"):
            record = masks.record(self._edits(matrices, (index + 1) / rounds))
            journal.write(0, record | {DONE: torch.tensor(index + 1)})
        return record

    def _edits(self, matrices: list[Matrix], share: float) -> Iterator[tuple[Matrix, WeightEdit]]:
        """Ask the method about all matrices as they stand, and carry out what it says."""
        gathered = moments(self.decoder, self.progress.track(self.tokens, "gradients"))
        views = []
        for matrix in matrices:
            inputs, outputs = gathered[matrix.block]
            view = look(matrix, inputs, ("gram",))
            moment = outputs[matrix.input]
            view.output_gram = moment if matrix.rows is None else moment[matrix.rows][:, matrix.rows]
            views.append(view)
        try:
            for matrix, edit in zip(matrices, self.method.prune_all(views, self.budget, share), strict=True):
                masks.apply(matrix, edit)
                yield matrix, edit
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.method.id} failed: {error}") from error
