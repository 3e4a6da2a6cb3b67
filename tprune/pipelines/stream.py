"""Pruning of matrices, block by block: gather statistics, prune, send the calibration text through, go on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tprune.core.statistics import Inputs, white
from tprune.core.weights import WeightEdit
from tprune.errors import UserError
from tprune.methods.region import RegionMethod
from tprune.methods.selective import SelectiveMethod
from tprune.methods.weight_view import LinearView
from tprune.methods.weights import WeightBudget, WeightMethod
from tprune.models import masks
from tprune.models.blocks import Decoder
from tprune.models.calibrate import Stream
from tprune.models.matrix import Matrix
from tprune.models.memory import give_back
from tprune.models.outputs import gather_selected
from tprune.models.pages import at_hand
from tprune.models.subject import pages_of
from tprune.pipelines.journal import Journal
from tprune.pipelines.region import LiveRegion
from tprune.progress import Progress

Gradients = dict[str, dict[str, Tensor]]
"""What was measured of gradients, by kind and parameter."""
FEW_TOKENS = 128
"""Experts that saw fewer calibration tokens are named in a warning."""


def generator(seed: int, name: str) -> torch.Generator:
    """A generator for one matrix, the same in any order of visits."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def check_pattern(decoder: Decoder, pattern: tuple[int, int] | None, groups_outputs: bool) -> None:
    """Refuse a pattern that does not divide the inputs of every matrix (where groups are of outputs, those)."""
    if pattern is None:
        return
    for index in range(len(decoder.blocks)):
        for matrix in decoder.matrices(index):
            axis = grouped_axis(matrix, groups_outputs)
            if matrix.shape[axis] % pattern[1]:
                raise UserError(
                    f"--pattern {pattern[0]}:{pattern[1]}: the {matrix.shape[axis]} {('outputs', 'inputs')[axis]} of "
                    f"{matrix.name} do not divide into groups of {pattern[1]}; choose a pattern whose M divides them"
                )


def grouped_axis(matrix: Matrix, groups_outputs: bool) -> int:
    """Along which axis [out, in] the groups of a pattern lie."""
    return 0 if groups_outputs and matrix.reader is not None else 1


def look(
    matrix: Matrix,
    inputs: dict[str, Inputs] | None,
    kinds: tuple[str, ...],
    gradients: Gradients | None = None,
) -> LinearView:
    """A matrix as methods see it, with statistics of the kinds `kinds` and gradients, where there are any."""
    weight = matrix.read()
    view = LinearView(matrix.name, matrix.block, weight)
    found = {kind: matrix.cut(held[matrix.parameter_name]) for kind, held in (gradients or {}).items()}
    view.gradients = {kind: part.to(weight.device) for kind, part in found.items()}
    view.gradient = view.gradients.pop("gradient", None)
    if inputs is None:
        return view
    name = matrix.name if matrix.name in inputs else matrix.input
    if name not in inputs:
        raise UserError(
            f"the inputs of {matrix.name} are not seen, since its module multiplies by the weight itself; choose a "
            "method that reads no inputs, such as magnitude"
        )
    seen = inputs[name]
    known = _result(seen, kinds, matrix.shape[1], weight.device)
    view.tokens, view.sequences, view.shared = seen.tokens, seen.sequences, seen.shared
    view.norm, view.gram = known.get("norm"), known.get("gram")
    if matrix.reader in inputs:
        read = _result(inputs[matrix.reader], kinds, matrix.shape[0], weight.device)
        view.channel_norm = read.get("norm")
    return view


def _result(seen: Inputs, kinds: tuple[str, ...], width: int, device: torch.device) -> dict[str, Tensor]:
    """The statistics of an input; where no token came, those of inputs that nothing is known of."""
    return seen.result() if seen.tokens else white(kinds, width, device)


class BlockPruner:
    """One run of a block-scope method over a decoder.

    Attributes:
        decoder: edited in place.
        method, budget, seed: what is done.
        stream: the calibration sequences; None for methods without statistics of them.
        gradients: by kind and parameter, for methods that read them.
        shares: the fraction that each matrix loses, by name, where that is not the same for all.
    """

    def __init__(
        self,
        decoder: Decoder,
        method: WeightMethod,
        budget: WeightBudget,
        seed: int,
        stream: Stream | None,
        progress: Progress,
        shares: dict[str, float] | None = None,
        gradients: Gradients | None = None,
    ):
        self.decoder, self.method, self.budget, self.seed = decoder, method, budget, seed
        self.stream, self.progress = stream, progress
        self.shares, self.gradients = shares or {}, gradients
        self.starved: dict[str, int] = {}

    def run(self, journal: Journal) -> dict[str, Tensor]:
        """Prune all blocks; finished ones are taken from the journal. Returns the record of all edits."""
        records: dict[str, Tensor] = {}
        depth = len(self.decoder.blocks)
        pages = pages_of(self.decoder.model)
        for index in self.progress.track(range(depth), "pruning"):
            with at_hand(self.decoder, index):
                finished = self._one(index, journal)
                if self.stream is not None and not self._dense_feeds and index + 1 < depth:
                    self.stream.advance(index)
            if pages is not None:
                pages.edits[index] = partial(journal.read, index)
                finished = masks.only_masks(finished)
            records |= finished
            give_back()
        self._warn()
        return records

    @property
    def _dense_feeds(self) -> bool:
        return self.stream is not None and self.method.propagate == "dense"

    def _one(self, index: int, journal: Journal) -> dict[str, Tensor]:
        """Prune a block, or carry out what the journal says of it; the record of its edits."""
        matrices, finished = self.decoder.matrices(index), journal.read(index)
        if finished is None:
            finished = self._prune(index, matrices)
            finished = journal.write(index, finished)
        else:
            if self._dense_feeds:
                self.stream.advance(index)
            masks.replay(matrices, finished)
        return finished

    def _prune(self, index: int, matrices: list[Matrix]) -> dict[str, Tensor]:
        inputs: dict[str, Inputs] = {}
        if isinstance(self.method, RegionMethod):
            return self._prune_region(index)
        if isinstance(self.method, SelectiveMethod):
            inputs = gather_selected(self.stream, index, self.method)
        elif self._dense_feeds:
            inputs, _ = self.stream.gather_and_advance(index, self.method.stats)
        elif self.stream is not None:
            inputs = self.stream.gather(index, self.method.stats)
        if pages_of(self.decoder.model) is not None:
            give_back()  # what the forwards had: pruning a matrix needs pieces of other sizes
        return masks.record(self._edits(matrices, inputs))

    def _prune_region(self, index: int) -> dict[str, Tensor]:
        """Hand the block itself to the method."""
        seeded = generator(self.seed, self.decoder.block_name(index))
        with LiveRegion(self.stream, index, self._view) as region:
            self.method.prune_block(region, seeded)
        return masks.record(region.edits())

    def _edits(
        self, matrices: list[Matrix], inputs: dict[str, Inputs]
    ) -> Iterator[tuple[Matrix, WeightEdit]]:
        """Edit the matrices one by one, and let go of the statistics that no later one reads."""
        last = {name: matrix for matrix in matrices for name in (matrix.input, matrix.reader)}
        for matrix in matrices:
            yield matrix, self._edit(matrix, inputs)
            for name in (matrix.input, matrix.reader):
                if last[name] is matrix:
                    inputs.pop(name, None)

    def _edit(self, matrix: Matrix, inputs: dict[str, Inputs]) -> WeightEdit:
        """Ask the method about one matrix and carry out what it says."""
        view, budget = self._view(matrix, None if self.stream is None else inputs)
        try:
            edit = self.method.prune(view, budget, generator(self.seed, matrix.name))
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.method.id} failed at {matrix.name}: {error}") from error
        masks.apply(matrix, edit)
        return edit

    def _view(self, matrix: Matrix, inputs: dict[str, Inputs] | None) -> tuple[LinearView, WeightBudget]:
        """A matrix with what is known of its inputs, and what it shall lose."""
        if inputs is not None and matrix.expert is not None and inputs[matrix.input].tokens < FEW_TOKENS:
            self.starved[matrix.name] = inputs[matrix.input].tokens
        view = look(matrix, inputs, self.method.stats, self.gradients)
        return view, replace(self.budget, sparsity=self.shares.get(matrix.name, self.budget.sparsity))

    def _warn(self) -> None:
        if self.starved:
            named = [f"{name} ({tokens})" for name, tokens in self.starved.items()]
            shown = ", ".join(named[:3]) + (", …" if len(named) > 3 else "")
            self.progress.warn(
                f"{len(self.starved)} expert matrices saw fewer than {FEW_TOKENS} calibration tokens: {shown}; "
                "those that saw none are pruned by magnitude. More text helps: --calibration N"
            )
