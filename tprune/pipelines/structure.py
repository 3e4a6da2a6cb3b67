"""Pruning of structure: statistics of all blocks from one dense pass, one plan, one edit of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tprune.core.weights import StructureEdit
from tprune.errors import UserError
from tprune.methods.weight_view import BlockView, ExpertView, MemberView, ModelView, UnitView
from tprune.methods.weights import WeightBudget, WeightMethod
from tprune.models import experts, shapes, units
from tprune.models.blocks import Decoder
from tprune.models.calibrate import Stream
from tprune.models.embeddings import embeddings, pool_of
from tprune.models.gradients import MEASURED, POWERS, SENSITIVITY, USAGE
from tprune.models.halves import half_sizes, masked
from tprune.models.teacher import Teacher
from tprune.pipelines.journal import Journal
from tprune.pipelines.removal import Removal
from tprune.pipelines.straying import Straying
from tprune.progress import Progress


class StructurePruner:
    """One run of a model-scope method over a decoder.

    Attributes:
        decoder: edited in place.
        method, budget: what is done.
        stream: the calibration sequences; None for methods that read nothing.
        plain: choose shapes that stock transformers can load.
        gradients: by kind and parameter, for methods that read them.
        max_minutes: how long a search may take; None for no limit.
        seed: of all that the method draws.
        before: what is done to the dense model when it is known what goes, if anything.
        known: losses that other searches in the same model have measured, as for `Removal`.
    """

    def __init__(
        self,
        decoder: Decoder,
        method: WeightMethod,
        budget: WeightBudget,
        stream: Stream | None,
        plain: bool,
        progress: Progress,
        gradients: dict[str, dict[str, Tensor]] | None = None,
        max_minutes: float | None = None,
        seed: int = 0,
        before: Callable[[list[StructureEdit]], None] | None = None,
        known: dict[bytes, float] | None = None,
    ):
        self.decoder, self.method, self.budget = decoder, method, budget
        self.stream, self.plain, self.progress = stream, plain, progress
        self.gradients, self.max_minutes, self.seed = gradients or {}, max_minutes, seed
        self.before, self.known = before, known

    @property
    def gathers(self) -> bool:
        """Whether the method reads what flows through the blocks."""
        return not set(self.method.stats) <= set(MEASURED)

    @property
    def by_block(self) -> bool:
        """Whether the method is asked for one block at a time, since pruned blocks feed the next."""
        return self.gathers and self.method.propagate == "pruned"

    def run(self, journal: Journal) -> tuple[list[StructureEdit], ModelView]:
        """Plan and carry out. Returns the edits and what they were decided by."""
        kinds = self._kinds()
        view = ModelView([], self.plain, seed=self.seed)
        if self.method.measures:
            self._open_to_search(view, journal)
        if self.method.teacher:
            view.teacher = partial(Teacher, self.decoder, self.stream.tokens)
        edits: list[StructureEdit] = []
        for index in self.progress.track(range(len(self.decoder.blocks)), "gathering"):
            block = self._gathered(index, kinds, journal)
            view.blocks.append(block)
            if self.by_block:
                edits += self._advance_pruned(replace(view, blocks=[block]))
        if not self.by_block:
            edits = self.method.plan(view, self.budget)
        edits = shapes.settled(self.decoder, edits)
        if self.plain:
            edits = [self._without_bias(edit) for edit in edits]
        if self.before is not None:
            self.before(edits)
        shapes.apply(self.decoder, edits)
        return edits, view

    def _kinds(self) -> list[str]:
        """The kinds of unit that the method looks at and that may be removed.

        Raises:
            UserError: none of them may, so that stock transformers or timm loads the result.
        """
        asked = [kind for kind in units.WIRING if kind in self.method.units]
        told = shapes.plain_kinds(self.decoder) if self.plain else asked
        if asked and not set(asked) & set(told):
            raise UserError(
                f"--loadable plain: the configuration of a {self.decoder.config.model_type} model has no words for "
                f"fewer {' or '.join(asked)}; leave it out, and load the result with tprune.load"
            )
        return [kind for kind in asked if kind in told]

    def _seen_with(self, edits: Sequence[StructureEdit]) -> list[BlockView]:
        """All blocks as they would be seen if the edits were carried out, without a journal."""
        twin = copy.copy(self)
        twin.stream = self.stream.again()
        with masked(self.decoder, edits):
            return [
                twin._gathered(index, self._kinds(), Journal(None, "again"))
                for index in range(len(self.decoder.blocks))
            ]

    def _advance_pruned(self, view: ModelView) -> list[StructureEdit]:
        """Plan one block by itself, and send the calibration sequences through it as it will be."""
        edits = self.method.plan(view, self.budget)
        with masked(self.decoder, edits):
            self.stream.advance(view.blocks[0].index)
        return edits

    def _open_to_search(self, view: ModelView, journal: Journal) -> None:
        """Let the view answer what a search asks."""
        start = self.stream.again() if self.gathers else self.stream
        view.losses_with = Removal(start, journal.part("losses"), self.progress, self.max_minutes, self.known)
        view.strayed_with = Straying(start, journal.part("strays"), self.progress, self.max_minutes)
        view.seen_with = self._seen_with if self.gathers else None

    def _gathered(self, index: int, kinds: list[str], journal: Journal) -> BlockView:
        """One block with its statistics, from the journal or from the stream, which then stands behind it."""
        places = self._places(index, kinds)
        return self._view(index, places, self._known(index, places, journal) if self.gathers else {})

    def _places(self, index: int, kinds: list[str]) -> dict[str, units.Site]:
        """Where the units of one block are.

        Raises:
            UserError: some kind cannot be removed there.
        """
        places = {kind: units.site(self.decoder, index, kind) for kind in kinds}
        for kind, place in places.items():
            if place is None:
                raise UserError(
                    f"{self.method.id} does not fit this model: the {kind} of {type(self.decoder.model).__name__} "
                    "cannot be removed (experts, norms over all heads, or an unknown layout)"
                )
        return places

    def _view(self, index: int, places: dict[str, units.Site], known: dict[str, Tensor]) -> BlockView:
        """One block with what is `known` of it."""
        parameters = sum(matrix.shape[0] * matrix.shape[1] for matrix in self.decoder.matrices(index))
        view = BlockView(index, parameters)
        if "halves" in self.method.units:
            view.halves = half_sizes(self.decoder, index)
        if experts.KIND in self.method.units:
            view.experts = self._experts(index, known)
        for name in ("similarity", "angle", "contrast"):
            setattr(view, name, known[name].item() if name in known else None)
        view.entering, view.leaving = known.get("entering"), known.get("leaving")
        sensitivity = self.gradients.get(SENSITIVITY, {})
        view.sensitivity = sensitivity.get(self.decoder.block_name(index))
        for kind, place in places.items():
            stored = _stored(place)
            own = {
                name: known[f"{kind}.{name}"].to(stored.device)
                for name in ("norm", "absolute", "gram", "mean", "variance", "fluctuation")
                if f"{kind}.{name}" in known
            }
            own["sensitivity"] = sensitivity.get(place.reader_name)
            own["usage"] = self.gradients.get(USAGE, {}).get(place.reader_name)
            members = partial(self._members, index, place)
            view.units[kind] = UnitView(
                kind, stored, place.width, place.heads, place.cost, **own, members=members
            )
        return view

    def _known(self, index: int, places: dict[str, units.Site], journal: Journal) -> dict[str, Tensor]:
        """The statistics of one block; the stream then stands behind it where dense blocks feed the next."""
        known, dense = journal.read(index), not self.by_block
        if known is not None:
            if dense:
                self.stream.advance(index)
            return known
        readers = [place.reader_name for place in places.values()]
        known = {}
        if dense:
            known["entering"] = at_summaries(self.stream)
            routed = "routing" in self.method.stats
            with experts.watching_routes(self.decoder, index) if routed else nullcontext({}) as routes:
                inputs, turned = self.stream.gather_and_advance(index, self.method.stats, readers)
            known |= routes
            known["leaving"] = at_summaries(self.stream)
            known |= {kind: torch.tensor(mean, dtype=torch.float64) for kind, mean in turned.items()}
            if "contrast" in self.method.stats:
                known["contrast"] = self.method.contrast(
                    embeddings(self.stream, pool_of(self.decoder.model, self.method))
                )
        else:
            inputs = self.stream.gather(index, self.method.stats, readers)
        for kind, place in places.items():
            if place.reader_name in inputs:
                found = inputs[place.reader_name].result()
                known |= {f"{kind}.{name}": value for name, value in found.items()}
        journal.write(index, known)
        return known

    def _experts(self, index: int, known: dict[str, Tensor]) -> ExpertView | None:
        """The experts of one block, with what its router did."""
        found = experts.mixture(self.decoder, index)
        if found is None:
            return None

        def neurons(chosen: Sequence[int]) -> Tensor:
            return torch.stack([found.neurons(expert) for expert in chosen])

        used = known["experts.uses"], known["experts.worth"]
        return ExpertView(found.count, found.cost, *used, neurons, found.matrices[0][0].parameter.dtype)

    def _members(self, index: int, place: units.Site) -> Iterator[MemberView]:
        """The matrices of a dependency group as methods see them, read one by one."""
        for matrix, axis in units.members(self.decoder, index, place):
            weight = matrix.read()
            found = {
                kind: units.by_unit(
                    matrix.cut(held[matrix.parameter_name]).to(weight.device), axis, place.count
                )
                for kind, held in self.gradients.items()
                if kind in POWERS
            }
            yield MemberView(
                units.by_unit(weight, axis, place.count),
                found.get("gradient_mean"),
                found.get("gradient_square"),
            )

    def _without_bias(self, edit: StructureEdit) -> StructureEdit:
        """The edit without the compensation that stock transformers has no place for."""
        stay = {kind: bias for kind, bias in edit.bias.items() if shapes.plain_bias(self.decoder, kind)}
        if edit.block == 0 and len(stay) < len(edit.bias):
            self.progress.warn(
                f"--loadable plain: a {self.decoder.config.model_type} model has no place for the bias compensation of "
                f"{', '.join(set(edit.bias) - set(stay))}; it is left out"
            )
        return replace(edit, bias=stay)


def at_summaries(stream: Stream) -> Tensor:
    """The hidden states at the last token of every text, or an image's class token: float32 [N, D] on the CPU."""
    chosen = stream.feed.summary()
    return stream.hidden[torch.arange(len(chosen)), chosen].float().cpu()


def _stored(place: units.Site) -> Tensor:
    """[out, in] of the projection that reads the units."""
    weight = place.reader.weight.data
    return weight.t() if units.is_transposed(place.reader) else weight
