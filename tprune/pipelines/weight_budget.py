"""How much of the weights a stage asks to remove, and how that is shared out."""

from __future__ import annotations

from tprune import recipe as recipes
from tprune.errors import UserError
from tprune.methods.allocate import Allocation, parse
from tprune.methods.weights import WeightBudget, WeightMethod
from tprune.recipe import Stage


def budget_of(stage: Stage, method: WeightMethod) -> WeightBudget:
    """What was asked.

    Raises:
        UserError: nothing, or a pattern of a method without.
    """
    if stage.pattern is not None:
        if not method.patterns:
            why = "knows no patterns" if method.scope == "trained" else "removes structure"
            raise UserError(f"--pattern {stage.pattern}: {stage.method} {why}; give --sparsity S")
        keep, group = recipes.pattern(stage.pattern)
        return WeightBudget(1 - keep / group, (keep, group))
    if stage.sparsity is None and not method.varies():
        both = "--sparsity S (such as 0.5) or --pattern N:M" if method.patterns else "--sparsity S"
        raise UserError(f"{stage.method} needs a budget: give {both}")
    return WeightBudget(stage.sparsity)


def allocation_of(stage: Stage, method: WeightMethod) -> Allocation | None:
    """How the budget is shared out among matrices; None where all lose the same fraction.

    Raises:
        UserError: no such rule, or it does not go with this method or a pattern.
    """
    found = parse(stage.allocate)
    if found is None:
        return None if stage.pattern else method.allocation()
    if method.scope != "block":
        raise UserError(f"--allocate {stage.allocate}: {stage.method} shares its budget out itself")
    if stage.pattern is not None:
        raise UserError(
            f"--allocate {stage.allocate}: --pattern {stage.pattern} leaves nothing to share out; give --sparsity S"
        )
    found.needs(method)
    return found
