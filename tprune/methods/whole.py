"""Methods that choose among the weights of all matrices at once, and may do so in several rounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tprune.methods.weights import WeightBudget, WeightMethod

if TYPE_CHECKING:
    from tprune.core.weights import WeightEdit
    from tprune.methods.weight_view import LinearView


@dataclass(frozen=True)
class WholeMethod(WeightMethod):
    """A method of scope "whole": statistics are of the whole model as it stands, taken anew in every round."""

    scope: ClassVar[str] = "whole"

    def rounds(self) -> int:
        """How many rounds there are."""
        return 1

    def prune_all(
        self, linears: Sequence[LinearView], budget: WeightBudget, share: float
    ) -> Iterator[WeightEdit]:
        """The edits of one round, in the order of `linears`.

        Args:
            linears: all matrices, with what is known of them now; each is read anew whenever it is asked for, so that
                not all need be in memory.
            budget: of all rounds.
            share: of the budget that shall be spent after this round, up to 1; zeros that are there count.
        """
        raise NotImplementedError
