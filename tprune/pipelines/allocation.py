"""Sharing a budget out among the matrices of a decoder, by one look at the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from tprune.core.statistics import Inputs
from tprune.methods.allocate import Allocation
from tprune.methods.base import WeightMethod
from tprune.methods.views import LinearView
from tprune.models.blocks import Decoder
from tprune.models.calibrate import Stream
from tprune.pipelines.journal import Journal
from tprune.pipelines.stream import look
from tprune.progress import Progress


def sparsities(
    decoder: Decoder,
    allocation: Allocation,
    method: WeightMethod,
    sparsity: float,
    stream: Callable[[], Stream],
    journal: Journal,
    progress: Progress,
) -> dict[str, float]:
    """The fraction that every matrix loses, by its name.

    Args:
        decoder: dense.
        allocation, method, sparsity: what is shared out, for whom.
        stream: starts the calibration sequences at the first block; called only where statistics are needed.
        journal: where the outcome of an interrupted run is found.
        progress: shows the pass.
    """
    names = [matrix.name for index in range(len(decoder.blocks)) for matrix in decoder.matrices(index)]
    known = journal.read(0)
    if known is None:
        kinds = allocation.needs(method)
        inputs = _gather(decoder, kinds, stream(), progress) if kinds else None

        def views() -> Iterator[LinearView]:
            for index in range(len(decoder.blocks)):
                for matrix in decoder.matrices(index):
                    yield look(matrix, None if inputs is None else inputs[index], kinds)

        with torch.no_grad():
            found = allocation.sparsities(views, method, sparsity)
        known = {"sparsity": torch.tensor(found, dtype=torch.float64)}
        journal.write(0, known)
    return dict(zip(names, known["sparsity"].tolist(), strict=True))


def _gather(
    decoder: Decoder, kinds: tuple[str, ...], stream: Stream, progress: Progress
) -> list[dict[str, Inputs]]:
    """The statistics of all blocks of the dense model."""
    blocks = progress.track(range(len(decoder.blocks)), "allocating")
    return [stream.gather_and_advance(index, kinds)[0] for index in blocks]
