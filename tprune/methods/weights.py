"""What a method that prunes weights, or structures of them, declares, is given and gives back; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tprune.methods.base import Method

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tprune.core.weights import StructureEdit, WeightEdit
    from tprune.methods.allocate import Allocation
    from tprune.methods.weight_view import LinearView, ModelView


@dataclass(frozen=True)
class WeightBudget:
    """How much of a set of weights goes.

    Attributes:
        sparsity: fraction of the prunable weights removed, 0 to 1; None where a method that `varies` decides.
        pattern: (n, m), n kept of every m consecutive inputs; None for unstructured and structured pruning.
    """

    sparsity: float | None
    pattern: tuple[int, int] | None = None


@dataclass(frozen=True)
class Regularised:
    """Next-token training on the calibration sequences, with the norms of the units that will go added to the loss.

    Attributes:
        penalty: of the sum of their norms.
        epochs: passes over the sequences; 0 for none.
        batch: sequences per step.
        lr: peak learning rate.
    """

    penalty: float
    epochs: float
    batch: int
    lr: float


@dataclass(frozen=True)
class Routed:
    """Training of a text encoder in which a router takes one head of each group for every token.

    Attributes:
        epochs: passes over the training data.
        batch: samples per step.
        lr: peak learning rate of the model; it falls linearly.
        router_lr: the same of the routers.
        grow: of the training, in which heads that are not taken fade.
        choose: of the training, after which the most used heads are the only ones.
    """

    epochs: float
    batch: int
    lr: float
    router_lr: float
    grow: float
    choose: float


@dataclass(frozen=True)
class WeightMethod(Method):
    """Units are weights, or the structures they form.

    A method of scope "block" is asked once per linear layer while the model streams by, and its decisions need
    nothing but that layer (`prune`). One of scope "model" is asked once, when the statistics of all
    blocks are known (`plan`); one of scope "whole" in rounds, with all matrices before it (`WholeMethod`);
    one of scope "trained" while the model is trained (`TrainedMethod`).
    """

    scope: ClassVar[str] = "block"
    stats: ClassVar[tuple[str, ...]] = ()
    """What is gathered at the input of every linear layer: "norm", "absolute", "gram", "moments"; in scope "whole"
    "output_gram" at its outputs; per block "similarity", "angle", "routing" (what the router of its experts does),
    "contrast" (`BlockView.contrast`, by the method's `pool` and `contrast`); or for every weight of the dense model,
    before anything is pruned, "gradient" (its norm over sequences), "gradient_mean" or "gradient_square" (the mean of
    its square), "triples" (means and mean squares of the gradients of two sets' contrastive losses, by the method's
    `pool` and `loss`); or "sensitivity", of the loss to what units put out."""
    units: ClassVar[tuple[str, ...]] = ()
    """The kinds of unit that a method of scope "model" looks at: "heads", "channels", "experts", "halves" of blocks."""
    measures: ClassVar[bool] = False
    """Whether a method of scope "model" searches: asks for losses of the edited model (`ModelView.losses_with`), or how
    far an edited encoder strays (`ModelView.strayed_with`)."""
    uniform: ClassVar[bool] = True
    """Whether a method of scope "model" can choose shapes that stock transformers loads (`--loadable plain`)."""
    part: ClassVar[str] = "all"
    """Which matrices of a block a method of scope "block" prunes and its budget counts: "all", or the "mlp"'s."""
    groups_outputs: ClassVar[bool] = False
    """Whether groups of a pattern are consecutive outputs, not inputs, in matrices that feed the channels of an MLP."""
    propagate: ClassVar[str] = "pruned"
    """What feeds the next block's statistics: the "pruned" blocks before it, or the "dense" ones. A method of scope
    "model" that lets pruned ones do so is asked for one block at a time."""
    teacher: ClassVar[bool] = False
    """Whether a method of scope "model" compares an encoder with itself, dense, as it goes (`ModelView.teacher`)."""
    regularised: ClassVar[Regularised | None] = None
    """How a method of scope "model" trains between the choice of what goes and its removal."""
    routed: ClassVar[Routed | None] = None
    """How a method of scope "model" trains before it is asked what goes; every unit then has its `usage`."""
    wraps: ClassVar[bool] = False
    """Whether a method of scope "block" puts matrices around those it prunes (`WeightEdit.around`)."""
    patterns: ClassVar[bool] = True
    """Whether n:m patterns are possible."""

    def allocation(self) -> Allocation | None:
        """How a sparsity is shared out where --allocate says nothing; None: all matrices lose the same fraction."""
        return None

    def score(self, linear: LinearView) -> Tensor:
        """What the weights of one linear layer are compared by, smallest first to go: float32 [out, in].

        For methods of scope "block" whose scores can be compared between layers.
        """
        raise NotImplementedError

    def prune(self, linear: LinearView, budget: WeightBudget, generator: torch.Generator) -> WeightEdit:
        """New weights of one linear layer (scope "block")."""
        raise NotImplementedError

    def plan(self, model: ModelView, budget: WeightBudget) -> list[StructureEdit]:
        """What is taken out of a whole model, or of the blocks that `model` shows (scope "model")."""
        raise NotImplementedError
