"""Sharing a budget out among the matrices of a decoder, by one look at the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from tprune.core.statistics import Inputs
from tprune.methods.allocate import Allocation
from tprune.methods.weight_view import LinearView
from tprune.methods.weights import WeightMethod
from tprune.models.blocks import Decoder
from tprune.models.calibrate import Stream
from tprune.models.gradients import MEASURED
from tprune.models.outputs import likeness_and_advance
from tprune.models.pages import at_hand
from tprune.pipelines.journal import Journal
from tprune.pipelines.stream import Gradients, look
from tprune.progress import Progress


class Sharing:
    """One allocation of a method's budget over a dense decoder.

    Attributes:
        decoder: dense, only looked at.
        rule, method: what is shared out, for whom.
        gradients: by kind and parameter, where the method reads them.
    """

    def __init__(
        self,
        decoder: Decoder,
        rule: Allocation,
        method: WeightMethod,
        gradients: Gradients | None,
        progress: Progress,
    ):
        self.decoder, self.rule, self.method = decoder, rule, method
        self.gradients, self.progress = gradients, progress

    @torch.no_grad()
    def run(self, sparsity: float, start: Callable[[], Stream], journal: Journal) -> dict[str, float]:
        """The fraction that every matrix loses, by its name.

        Args:
            sparsity: of all of them.
            start: puts the calibration sequences before the first block; called only where they are needed.
            journal: where the outcome of an interrupted run is found.
        """
        blocks = range(len(self.decoder.blocks))
        known = journal.read(0)
        if known is None:
            kinds = self.rule.needs(self.method)
            inputs: list[dict[str, Inputs]] | None = None
            likeness: dict[str, tuple[float, ...]] = {}
            if "likeness" in kinds:
                stream = start()
                for index in self.progress.track(blocks, "allocating"):
                    likeness |= likeness_and_advance(stream, index)
            elif set(kinds) - set(MEASURED):
                stream = start()
                track = self.progress.track(blocks, "allocating")
                inputs = [stream.gather_and_advance(index, kinds)[0] for index in track]

            def views() -> Iterator[LinearView]:
                for index in blocks:
                    seen = None if inputs is None else inputs[index]
                    with at_hand(self.decoder, index):
                        for matrix in self.decoder.matrices(index):
                            view = look(matrix, seen, kinds, self.gradients)
                            view.likeness = likeness.get(matrix.name, ())
                            yield view

            found = self.rule.sparsities(views, self.method, sparsity)
            known = {"sparsity": torch.tensor(found, dtype=torch.float64)}
            journal.write(0, known)
        names = [matrix.name for index in blocks for matrix in self.decoder.matrices(index)]
        return dict(zip(names, known["sparsity"].tolist(), strict=True))
