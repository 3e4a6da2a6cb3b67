"""Pruning of structure: statistics of all blocks from one dense pass, one plan, one edit of the model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tprune.core.weights import StructureEdit
from tprune.errors import UserError
from tprune.methods.views import BlockView, ModelView, UnitView
from tprune.methods.weights import WeightBudget, WeightMethod
from tprune.models import shapes, units
from tprune.models.blocks import Decoder
from tprune.models.calibrate import Stream
from tprune.pipelines.journal import Journal
from tprune.pipelines.removal import Removal
from tprune.progress import Progress

KEEP, BIAS, REMOVED = "keep/", "bias/", "removed"


class StructurePruner:
    """One run of a model-scope method over a decoder.

    Attributes:
        decoder: edited in place.
        method, budget: what is done.
        stream: the calibration sequences; None for methods that read nothing.
        plain: choose shapes that stock transformers can load.
    """

    def __init__(
        self,
        decoder: Decoder,
        method: WeightMethod,
        budget: WeightBudget,
        stream: Stream | None,
        plain: bool,
        progress: Progress,
    ):
        self.decoder, self.method, self.budget = decoder, method, budget
        self.stream, self.plain, self.progress = stream, plain, progress

    def run(self, journal: Journal) -> tuple[list[StructureEdit], ModelView]:
        """Plan and carry out. Returns the edits and what they were decided by."""
        kinds = shapes.plain_kinds(self.decoder) if self.plain else list(units.WIRING)
        kinds = [kind for kind in kinds if kind in self.method.units]
        blocks = []
        for index in self.progress.track(range(len(self.decoder.blocks)), "gathering"):
            blocks.append(self._view(index, kinds, journal))
        for kind in kinds:
            if not all(kind in block.units for block in blocks):
                raise UserError(
                    f"{self.method.id} does not fit this model: the {kind} of {type(self.decoder.model).__name__} "
                    "cannot be removed (experts, norms over all heads, or an unknown layout)"
                )
        view = ModelView(blocks, self.plain, self._losses(journal) if self.method.measures else None)
        edits = self.method.plan(view, self.budget)
        if self.plain:
            edits = [self._without_bias(edit) for edit in edits]
        shapes.apply(self.decoder, edits)
        return edits, view

    def _losses(self, journal: Journal) -> Removal:
        return Removal(self.stream, Journal(journal.folder, f"{journal.name}-losses"), self.progress)

    def _view(self, index: int, kinds: list[str], journal: Journal) -> BlockView:
        """One block with its statistics, from the journal or from the stream, which then stands behind it."""
        places = {kind: units.site(self.decoder, index, kind) for kind in kinds}
        places = {kind: place for kind, place in places.items() if place is not None}
        parameters = sum(matrix.shape[0] * matrix.shape[1] for matrix in self.decoder.matrices(index))
        known = journal.read(index)
        if known is not None:
            self.stream.advance(index)
        elif self.method.stats:
            readers = [place.reader_name for place in places.values()]
            entering = self.stream.hidden[:, -1].float().cpu().clone()
            inputs, similarity = self.stream.gather_and_advance(index, self.method.stats, readers)
            known = {
                f"{kind}.{name}": value
                for kind, place in places.items()
                if place.reader_name in inputs
                for name, value in inputs[place.reader_name].result().items()
            }
            known |= {"entering": entering, "leaving": self.stream.hidden[:, -1].float().cpu().clone()}
            known["similarity"] = torch.tensor(similarity, dtype=torch.float64)
            journal.write(index, known)
        known = known or {}
        view = BlockView(index, parameters)
        if known:
            view.similarity = known["similarity"].item()
            view.entering, view.leaving = known["entering"], known["leaving"]
        for kind, place in places.items():
            weight = _weight(place)
            own = {
                name: known[f"{kind}.{name}"].to(weight.device)
                for name in ("norm", "mean", "variance", "fluctuation")
                if f"{kind}.{name}" in known
            }
            view.units[kind] = UnitView(kind, weight, place.width, place.heads, place.cost, **own)
        return view

    def _without_bias(self, edit: StructureEdit) -> StructureEdit:
        """The edit without the compensation that stock transformers has no place for."""
        stay = {kind: bias for kind, bias in edit.bias.items() if shapes.plain_bias(self.decoder, kind)}
        if edit.block == 0 and len(stay) < len(edit.bias):
            self.progress.warn(
                f"--loadable plain: a {self.decoder.config.model_type} model has no place for the bias compensation of "
                f"{', '.join(set(edit.bias) - set(stay))}; it is left out"
            )
        return replace(edit, bias=stay)


def _weight(place: units.Site) -> Tensor:
    """float32 [out, in] of the projection that reads the units."""
    weight = place.reader.weight.data
    return (weight.t() if units.is_transposed(place.reader) else weight).float()


def record(edits: list[StructureEdit]) -> dict[str, Tensor]:
    """The edits as tensors."""
    tensors: dict[str, Tensor] = {}
    for edit in edits:
        for kind, keep in edit.keep.items():
            tensors[f"{KEEP}{edit.block}.{kind}"] = keep.cpu()
        for kind, bias in edit.bias.items():
            tensors[f"{BIAS}{edit.block}.{kind}"] = bias.cpu()
    tensors[REMOVED] = torch.tensor([edit.block for edit in edits if edit.removed], dtype=torch.int64)
    return tensors


def edits_of(tensors: dict[str, Tensor]) -> list[StructureEdit]:
    """What `record` stored."""
    removed = set(tensors[REMOVED].tolist())
    found = {block: StructureEdit(block, removed=True) for block in removed}
    for name, tensor in tensors.items():
        if name == REMOVED:
            continue
        block, _, kind = name.removeprefix(KEEP).removeprefix(BIAS).partition(".")
        edit = found.setdefault(int(block), StructureEdit(int(block)))
        (edit.keep if name.startswith(KEEP) else edit.bias)[kind] = tensor
    return [found[block] for block in sorted(found)]
