"""From "keep this fraction" to a method's own stage sizes, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil, floor


@dataclass(frozen=True, order=True)
class Site:
    """A place where tokens may leave: before block `layer`, or between its attention and its MLP.

    Layer -1 is the projector's output of a vision-language model: before the decoder sees any token.
    """

    layer: int
    between: bool = False

    @property
    def sublayer(self) -> int:
        """How many attention and MLP sublayers ran before this place."""
        return max(0, 2 * self.layer + self.between)

    def __str__(self) -> str:
        if self.layer < 0:
            return "projector"
        return f"{self.layer}.between" if self.between else str(self.layer)


PROJECTOR = Site(-1)


@dataclass(frozen=True)
class Stage:
    """After `site`, `count` prunable tokens are left.

    With `skips` it is the attention of the block (`between`: its MLP) that is left out, for all tokens; `count` is then
    what it was.
    Where the next attention has more keys than what is left (`core.reduction.Sight`), `seen` is how many.
    """

    site: Site
    count: int
    skips: bool = False
    seen: int = 0


def counts_entering(stages: Sequence[Stage], tokens: int, depth: int) -> list[int]:
    """How many prunable tokens enter each of the 2·depth attention and MLP sublayers."""
    entering, alive, waiting = [], tokens, sorted(stages, key=lambda stage: stage.site)
    skipped = {stage.site.sublayer for stage in stages if stage.skips}
    seen = {stage.site.sublayer: stage.seen for stage in stages if stage.seen}
    for sublayer in range(2 * depth):
        while waiting and waiting[0].site.sublayer <= sublayer:
            alive = waiting.pop(0).count
        entering.append(0 if sublayer in skipped else seen.get(sublayer, alive))
    return entering


def mean_entering(stages: Sequence[Stage], tokens: int, depth: int) -> float:
    """The budget's meaning: the fraction of prunable tokens that enter, averaged over all sublayers."""
    return sum(counts_entering(stages, tokens, depth)) / (2 * depth * tokens)


def mean_leaving(stages: Sequence[Stage], tokens: int, depth: int) -> float:
    """The fraction that leaves a layer, averaged over layers: what some papers report.

    A layer that runs in full and prunes afterwards counts as pruned (SparseVLM, AdaptInfer).
    """
    entering = counts_entering([stage for stage in stages if not stage.skips], tokens, depth)
    last = min((stage.count for stage in stages), default=tokens)
    return sum([*entering[2::2], last]) / (depth * tokens)


def bisect(measure: Callable[[float], float], target: float, steps: int = 40) -> float:
    """The knob in [0, 1] whose `measure` comes nearest to `target`; `measure` rises with the knob.

    Works on step functions: both ends of the last bracket are compared, the larger knob wins a tie.
    """
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if measure(middle) < target else (low, middle)
    return min((high, low), key=lambda knob: abs(measure(knob) - target))


def knob_at(
    keep: float | None, stages: Callable[[float], Sequence[Stage]], tokens: int, depth: int
) -> float | None:
    """The knob at which `stages` keep the mean fraction `keep`, as near as counts allow; None where none is asked.

    Args:
        keep: mean fraction entering, over all attention and MLP sublayers.
        stages: of a knob in [0, 1]; what they keep rises with it.
        tokens, depth: of the model.
    """
    if keep is None or keep == 1:
        return keep
    return bisect(lambda knob: mean_entering(stages(knob), tokens, depth), keep)


def whole_steps(rates: Sequence[float]) -> list[int]:
    """Fractional amounts as whole ones with nearly the same running sum: what rounding leaves over goes to the next."""
    due = list(accumulate(rates, initial=0.0))
    return [floor(after) - floor(before) for before, after in pairwise(due)]


def falling_counts(mean: float, most: int, layers: int, steepness: float) -> list[int]:
    """Counts that fall by equal steps from layer to layer and have this mean (PyramidKV).

    Args:
        mean: of all layers.
        most: of any layer; the slope is less where the first would have more.
        layers: how many.
        steepness: the last layer has mean / steepness, 1 or more; 1 gives all the same.
    """
    if layers == 1:
        return [round(mean)]
    last = max(mean / steepness, 2 * mean - most)
    rates = [2 * mean - last - 2 * (mean - last) * layer / (layers - 1) for layer in range(layers)]
    return [round(after) - round(before) for before, after in pairwise(accumulate(rates, initial=0.0))]


def ratio_stages(
    layers: Sequence[int], ratio: float, tokens: int, depth: int, *, between: bool = False
) -> list[Stage]:
    """A schedule of three-stage papers: ceil(ratio · n) of the n tokens that are left stay at each of `layers`.

    Args:
        layers: blocks, of 12.
        ratio: 0 to 1; at least one token stays.
        tokens, depth: of the model.
        between: whether the sites lie between attention and MLP, and not before the block.
    """
    stages, alive = [], tokens
    for layer in layers:
        alive = max(1, ceil(ratio * alive))
        stages.append(Stage(Site(scale_layer(layer, 12, depth), between), alive))
    return stages


def even_stages(rate: float, tokens: int, depth: int) -> list[Stage]:
    """`rate` tokens, whole or not, fewer between attention and MLP of every block, as long as one is left."""
    stages, alive = [], tokens
    for layer, leaving in enumerate(whole_steps([rate] * depth)):
        alive = max(1, alive - leaving)
        stages.append(Stage(Site(layer, between=True), alive))
    return stages


def exponent(knob: float) -> float:
    """The power to which a paper's fractions are raised: 1 at the knob's middle, 0 (all is kept) at 1, ∞ at 0."""
    return (1 - knob) / knob if knob else float("inf")


def staircase(layers: Sequence[int], counts: Sequence[int], paper_depth: int, depth: int) -> list[Stage]:
    """Tokens leave again and again: before `layers`, of `paper_depth`, down to `counts`, never more than were left.

    Layers that fall on one of a shallower model act there at once; the first layer keeps all.
    """
    left: dict[int, int] = {}
    for layer, count in zip(layers, counts, strict=True):
        place = max(1, scale_layer(layer, paper_depth, depth))
        left[place] = min(count, left.get(place, count))
    places = sorted(left)
    alive = accumulate((left[place] for place in places), min)
    return [Stage(Site(place), count) for place, count in zip(places, alive, strict=True)]


def scale_layer(layer: int, paper_depth: int, depth: int) -> int:
    """A layer index that a paper gives for its own depth, at the same relative depth of another model."""
    return min(round(layer * depth / paper_depth), depth - 1)
