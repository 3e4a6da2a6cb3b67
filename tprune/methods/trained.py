"""Methods that learn which weights stay, while the weights themselves are trained; without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tprune.core.schedule import cubic_rise
from tprune.errors import UserError
from tprune.methods.base import param
from tprune.methods.weights import WeightMethod

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TrainedMethod(WeightMethod):
    """A method of scope "trained": every weight has a score, and both are trained, the score by what its mask would do.

    The defaults are those of movement pruning, on 88,000 questions of SQuAD; its warm-up of 5,400 steps is a tenth.
    """

    scope: ClassVar[str] = "trained"
    patterns: ClassVar[bool] = False

    epochs: float = param(10.0, "Passes over the training data, fractions allowed", low=0, kw_only=True)
    batch: int = param(16, "Samples per step, over all processes", low=1, kw_only=True)
    lr: float = param(3e-5, "Peak learning rate of the weights; it falls linearly", low=0, kw_only=True)
    score_lr: float = param(1e-2, "Peak learning rate of the scores", low=0, kw_only=True)
    warmup: float = param(
        0.1, "Fraction of the steps at which learning rates still rise", low=0, high=1, kw_only=True
    )
    initial_warmup: float = param(1.0, "Warm-ups before the first weight goes", low=0, kw_only=True)
    final_warmup: float = param(2.0, "Warm-ups at the end in which no more go", low=0, kw_only=True)
    weight_decay: float = param(0.0, "Of weights, not of scores, biases and norms", low=0, kw_only=True)
    clip: float = param(1.0, "Largest norm of all gradients together", low=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.initial_warmup + self.final_warmup) * self.warmup >= 1:
            raise UserError(
                f"--set warmup={self.warmup:g}: with {self.initial_warmup:g} before and {self.final_warmup:g} after, "
                "no steps are left in which weights go; give less"
            )

    def risen(self, done: float) -> float:
        """How much of the budget is spent when `done` of the training is over: 0 to 1."""
        start, stop = self.initial_warmup * self.warmup, 1 - self.final_warmup * self.warmup
        return cubic_rise(done, start, stop)

    def removed(self, scores: Sequence[Tensor], done: float, sparsity: float | None) -> list[Tensor]:
        """Which weights are masked when `done` of the training is over.

        Args:
            scores: float32 [out, in] of every matrix.
            done: 0 to 1.
            sparsity: of all matrices at the end; None for a method that `varies`, which decides itself.

        Returns:
            bool [out, in] of every matrix, True where a weight is masked.
        """
        raise NotImplementedError

    def penalty(self, scores: Sequence[Tensor], done: float) -> Tensor | None:
        """What the scores add to the loss, a scalar, where they do."""
        return None
