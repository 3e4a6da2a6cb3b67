"""Pruning by levels: versions of every site, and the search for the best model made of them."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from torch import Tensor

from tprune.core.levels import offspring
from tprune.core.weights import HALF_OF, StructureEdit
from tprune.methods.weight_view import BlockView, ModelView, Place
from tprune.models import shapes
from tprune.models.halves import masked
from tprune.pipelines.divergence import Divergence, Sample, draw
from tprune.pipelines.journal import Journal
from tprune.pipelines.structure import StructurePruner


@dataclass(frozen=True)
class Grid:
    """The levels of all sites in one round; 0 is where it starts.

    Attributes:
        counts: units of every site.
        gone: how many of them go at level 0.
        steps: per kind, how many more go at the next level.
        reach: the furthest level, up and down; None for no limit.
    """

    counts: dict[Place, int]
    gone: dict[Place, int]
    steps: dict[str, int]
    reach: int | None

    def range(self, place: Place) -> tuple[int, int]:
        """The lowest and the highest level of a site."""
        step, gone = self.steps[place[1]], self.gone[place]
        low, high = gone // step, (self.counts[place] - gone) // step
        return (-low, high) if self.reach is None else (-min(low, self.reach), min(high, self.reach))

    def at(self, place: Place, level: int) -> int:
        """How many units of a site go at a level."""
        return self.gone[place] + level * self.steps[place[1]]

    def pruned(self, place: Place) -> dict[int, int]:
        """How many units go, by level, where some go and some stay."""
        low, high = self.range(place)
        found = {level: self.at(place, level) for level in range(low, high + 1)}
        return {level: gone for level, gone in found.items() if 0 < gone < self.counts[place]}


class LevelPruner(StructurePruner):
    """One run of a `LevelMethod` over a decoder."""

    def run(self, journal: Journal) -> tuple[list[StructureEdit], ModelView]:
        """Make versions, search, and again around what was found; carry out the last. Returns as in any pruning."""
        kinds, beginning = self._kinds(), self.stream
        every = range(len(self.decoder.blocks))
        view = ModelView(
            [self._view(index, self._places(index, kinds), {}) for index in every], seed=self.seed
        )
        counts = {
            (block.index, kind): unit.count for block in view.blocks for kind, unit in block.units.items()
        }
        gone, edits = self.method.start(view.blocks, self.budget.sparsity), []
        measure = Divergence(
            beginning,
            journal.part("divergences"),
            self.progress,
            self.max_minutes,
            self.method.top,
            self.method.rate,
        )
        random = Random(self.seed)
        for turn in range(self.method.rounds if any(gone.values()) else 0):
            grid = Grid(counts, gone, self._steps(counts, gone, turn), self.method.reach)
            self.stream = beginning.again()
            versions = self._versions(grid, turn, journal.part(f"versions-{turn}"))
            levels = self._search(grid, versions, measure, random)
            gone = {place: grid.at(place, level) for place, level in levels.items()}
            edits = shapes.settled(self.decoder, put_together(grid, versions, levels))
        shapes.apply(self.decoder, edits)
        return edits, view

    def _steps(self, counts: dict[Place, int], gone: dict[Place, int], turn: int) -> dict[str, int]:
        """Per kind, how many units are between two levels: the same in all blocks, so that exchanges cost nothing."""
        found = {}
        for kind in {kind: None for _, kind in counts}:
            own = [place for place in counts if place[1] == kind]
            mean = sum(gone[place] for place in own) / len(own)
            found[kind] = self.method.step(kind, min(counts[place] for place in own), mean, turn)
        return found

    def _versions(self, grid: Grid, turn: int, journal: Journal) -> dict[int, dict[str, Tensor]]:
        """The versions of every block, from the journal or made while the calibration sequences go by."""
        found, kinds = {}, self._kinds()
        for index in self.progress.track(range(len(self.decoder.blocks)), f"versions, round {turn + 1}"):
            known = journal.read(index)
            behind = known is None and not self.by_block
            if known is None:
                block = self._gathered(index, kinds, Journal(None, "statistics"))
                known = journal.write(index, self._made(block, grid))
            found[index] = known
            if not behind:
                start = {place: 0 for place in grid.counts if place[0] == index}
                with masked(self.decoder, put_together(grid, found, start) if self.by_block else ()):
                    self.stream.advance(index)
        return found

    def _made(self, block: BlockView, grid: Grid) -> dict[str, Tensor]:
        """What stays of every site of a block, and its new weights, by kind and level."""
        dtype, made = next(self.decoder.core.parameters()).dtype, {}
        for kind, unit in block.units.items():
            levels = grid.pruned((block.index, kind))
            versions = self.method.versions(unit, list(levels.values()))
            for level, (keep, weight) in zip(levels, versions, strict=True):
                made[f"{kind}.{level}.keep"] = keep.cpu()
                made[f"{kind}.{level}.weight"] = weight.to(dtype).cpu()
        return made

    def _search(
        self,
        grid: Grid,
        versions: dict[int, dict[str, Tensor]],
        measure: Divergence,
        random: Random,
    ) -> dict[Place, int]:
        """The level of every site, by evolution."""
        method, places = self.method, list(grid.counts)
        kinds, ranges = [kind for _, kind in places], [grid.range(place) for place in places]
        parent = (0,) * len(places)
        for _ in range(method.generations):
            alive = offspring(parent, kinds, ranges, method.offspring, method.exchanges, random)
            if not alive:
                break
            for stage, (survivors, tokens, training) in enumerate(method.stages()):
                if stage == len(method.survivors) - 1:
                    alive.append(parent)
                candidates = [
                    put_together(grid, versions, dict(zip(places, levels, strict=True))) for levels in alive
                ]
                sample, trained_on = (self._draw(count, random) for count in (tokens, training))
                order = measure(candidates, sample, trained_on).nan_to_num(float("inf")).argsort(stable=True)
                alive = [alive[place] for place in order[:survivors].tolist()]
            parent = alive[0]
        return dict(zip(places, parent, strict=True))

    def _draw(self, tokens: int, random: Random) -> Sample:
        return draw(*self.stream.tokens.shape, tokens, random)


def put_together(
    grid: Grid, versions: dict[int, dict[str, Tensor]], levels: dict[Place, int]
) -> list[StructureEdit]:
    """The edits that give every site its level: versions; what stays dense has none, what goes whole is a half."""
    found: dict[int, StructureEdit] = {}
    for (index, kind), level in levels.items():
        edit = found.setdefault(index, StructureEdit(index))
        if level in grid.pruned((index, kind)):
            edit.keep[kind] = versions[index][f"{kind}.{level}.keep"]
            edit.weight[kind] = versions[index][f"{kind}.{level}.weight"]
        elif grid.at((index, kind), level):
            found[index] = StructureEdit(
                index, halves=(*edit.halves, HALF_OF[kind]), keep=edit.keep, weight=edit.weight
            )
    return [edit for edit in found.values() if edit.keep or edit.halves]
