"""Pruning of matrices that are chosen together, in rounds; the journal holds what the last one left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import psutil
import torch
from torch import Tensor

from tprune.core.weights import WeightEdit
from tprune.errors import UserError
from tprune.methods.weight_view import LinearView
from tprune.methods.weights import WeightBudget
from tprune.methods.whole import WholeMethod
from tprune.models import masks
from tprune.models.blocks import Decoder, is_linear, width
from tprune.models.curvature import moments
from tprune.models.matrix import Matrix
from tprune.pipelines.journal import Journal
from tprune.progress import Progress

SHARE = 0.5
"""Of the memory that is free, what moments may take; inverses, new weights and gradients need the rest."""
DONE = "rounds"
"""Beside the edits in the journal: how many rounds made them."""


class Views(Sequence):
    """Matrices as methods see them, each made when it is asked for.

    Args:
        matrices: in order.
        moments: by name, those of inputs, "in/NAME", and of gradients at outputs, "out/NAME"; maybe in a file.
    """

    def __init__(self, matrices: Sequence[Matrix], moments: dict[str, Tensor]):
        self.matrices, self.moments = matrices, moments

    def __len__(self) -> int:
        """How many matrices there are."""
        return len(self.matrices)

    def __getitem__(self, place: int) -> LinearView:
        """The matrix as it stands, with its moments where it is."""
        matrix = self.matrices[place]
        weight = matrix.read()
        inner, outer = (self.moments[f"{side}/{matrix.input}"].to(weight.device) for side in ("in", "out"))
        outer = outer if matrix.rows is None else outer[matrix.rows][:, matrix.rows]
        return LinearView(matrix.name, matrix.block, weight, gram=inner, output_gram=outer)


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
            record = masks.record(self._edits(matrices, (index + 1) / rounds, journal))
            journal.write(0, record | {DONE: torch.tensor(index + 1)})
        return record

    def _moments(self, journal: Journal) -> dict[str, Tensor]:
        """Those of all matrices, `Views` knows by which names.

        Where they are more than `SHARE` of the memory that is free and the journal has a folder, they are gathered for
        some of the blocks at a time, each time by all sequences, and wait in files.
        """
        depth = len(self.decoder.blocks)
        room = int(SHARE * psutil.virtual_memory().available / max(map(self._size, range(depth))))
        together = depth if journal.folder is None else min(max(room, 1), depth)
        held: dict[str, Tensor] = {}
        for first in range(0, depth, together):
            blocks = range(first, min(first + together, depth))
            gathered = moments(self.decoder, self.progress.track(self.tokens, "gradients"), blocks)
            for block, (inputs, outputs) in zip(blocks, gathered, strict=True):
                own = {id(seen): seen.result()["gram"] for seen in inputs.values()}
                found = {str(place): gram for place, gram in enumerate(own.values())}
                found |= {f"out/{name}": moment for name, moment in outputs.items()}
                if together < depth:
                    found = journal.part("moments").write(block, found)
                places = {seen: str(place) for place, seen in enumerate(own)}
                held |= {name: found[name] for name in found if name.startswith("out/")}
                held |= {f"in/{name}": found[places[id(seen)]] for name, seen in inputs.items()}
        return held

    def _size(self, block: int) -> int:
        """Bytes of a block's moments, if no two of its layers had one input."""
        layers = [layer for layer in self.decoder.inputs(block).values() if is_linear(layer)]
        return sum(4 * (rows**2 + columns**2) for rows, columns in map(width, layers))

    def _edits(
        self, matrices: list[Matrix], share: float, journal: Journal
    ) -> Iterator[tuple[Matrix, WeightEdit]]:
        """Ask the method about all matrices as they stand, and carry out what it says."""
        views = Views(matrices, self._moments(journal))
        try:
            for matrix, edit in zip(matrices, self.method.prune_all(views, self.budget, share), strict=True):
                masks.apply(matrix, edit)
                yield matrix, edit
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.method.id} failed: {error}") from error
