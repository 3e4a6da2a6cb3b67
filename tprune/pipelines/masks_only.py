"""What is said of models that only methods which mask weights go with."""

from __future__ import annotations

from tprune.errors import UserError
from tprune.methods.weights import WeightMethod
from tprune.models.gradients import TRIPLES
from tprune.recipe import Stage


def check_masks_only(stage: Stage, method: WeightMethod, said: str, others: str = "") -> None:
    """Refuse all but methods that mask weights matrix by matrix.

    Args:
        stage, method: what was asked.
        said: of the model, as the error begins.
        others: what else can be chosen, as it ends.

    Raises:
        UserError: naming the method.
    """
    if method.scope != "block" or method.wraps or TRIPLES in method.stats:
        raise UserError(
            f"{said}, and {stage.method} is made for a decoder of text as a whole; choose a method that needs a matrix "
            f"and its inputs, such as magnitude, wanda, sparsegpt or alps{others}"
        )
