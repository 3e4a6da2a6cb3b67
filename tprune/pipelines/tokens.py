"""Budgets of token methods: from `--keep` to a method's stages, and what they amount to."""

from __future__ import annotations

from functools import lru_cache

import torch

from tprune.core.budget import Stage, bisect, counts_entering, mean_entering
from tprune.errors import BudgetError
from tprune.methods.tokens import Shape, TokenMethod


@lru_cache(maxsize=4096)
def solve(method: TokenMethod, shape: Shape, keep: float | None) -> tuple[Stage, ...]:
    """The stages at which `method` keeps the fraction `keep` of the prunable tokens, as near as counts allow.

    Args:
        method: whose proportions are scaled.
        shape: the model and its number of prunable tokens.
        keep: mean fraction entering, over all attention and MLP sublayers; None for the method's own
            hyperparameters.

    Raises:
        BudgetError: out of the method's reach, or so close to 1 that nothing would be pruned.
    """
    if shape.tokens == 0:
        return ()
    if keep is None:
        return tuple(sorted(method.stages(shape, None), key=lambda stage: stage.site))

    def measure(knob: float) -> float:
        return mean_entering(method.stages(shape, knob), shape.tokens, shape.depth)

    floor = measure(0.0)
    # Half a token in one sublayer is what rounding may cost.
    slack = 0.5 / shape.tokens
    if keep < floor - slack:
        raise BudgetError(
            f"--keep {keep:g}: {method.id} reaches {floor:.3f} to 1 on this model "
            f"({shape.tokens} tokens, {shape.depth} blocks); ask for more, or change its stages with --set",
            floor,
            1.0,
        )
    stages = method.stages(shape, 1.0 if keep == 1 else bisect(measure, keep))
    if keep < 1 and min(counts_entering(stages, shape.tokens, shape.depth)) == shape.tokens:
        raise BudgetError(
            f"--keep {keep:g} rounds to keeping all {shape.tokens} tokens with {method.id}; ask for less"
        )
    return tuple(sorted(stages, key=lambda stage: stage.site))


def for_timing(method: TokenMethod, shape: Shape, seed: int, device: torch.device | str) -> TokenMethod:
    """The method as its speed is measured: what it must learn or calibrate is as it is before.

    The values do not change the time.
    """
    if method.learns != "required" and not method.calibrates:
        return method
    return method.bind({name: t.to(device) for name, t in method.neutral_state(shape, seed).items()})
