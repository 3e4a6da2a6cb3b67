"""What a weight method is given to look at: matrices, removable units, blocks and the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tprune.core.weights import StructureEdit


@dataclass(eq=False)
class LinearView:
    """One prunable matrix, whatever its storage: a Linear, a transposed Conv1D, a slice of fused or stacked ones.

    Attributes:
        name: its full name in the model, with a suffix for slices of a fused or stacked parameter.
        block: index of the block it stands in.
        weight: float32 [out, in], a copy.
        norm: float32 [in], the L2 norm of each input over all calibration tokens, if asked for.
        channel_norm: float32 [out], of a matrix that feeds an MLP, the L2 norm of the channel that each output makes
            (as the projection behind reads it), where `norm` was asked for; None for any other matrix.
        gram: float32 [in, in], (2 / sequences) · Σ x xᵀ, if asked for; what is computed of it once for all may take its
            place.
        output_gram: float32 [out, out], (2 / sequences) · Σ g gᵀ of the loss's gradients at the outputs, if asked for.
        gradient: float32 [out, in], the L2 norm over calibration sequences of the gradient of the dense model's loss,
            if asked for.
        gradients: float32 [out, in] each, where "triples" were asked for: "domain_mean" and "general_mean", over
            batches of triples, of the gradients of the dense model's loss; "domain_square" and "general_square", the
            sum of their squares over the number of triples.
        likeness: how alike its outputs for two tokens of a sequence are, if asked for: the means of the positive
            cosines of two that show images and of two of text, and of all cosines of one with the other, if there are.
        tokens, sequences: how many calibration tokens it saw, of how many sequences.
        shared: what was computed from the statistics so far, for all matrices with the same inputs.
    """

    name: str
    block: int
    weight: Tensor
    norm: Tensor | None = None
    channel_norm: Tensor | None = None
    gram: Tensor | None = None
    output_gram: Tensor | None = None
    gradient: Tensor | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    likeness: tuple[float, ...] = ()
    tokens: int = 0
    sequences: int = 0
    shared: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """`make()`, computed once for all matrices with the same inputs (q, k and v; gate and up)."""
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]


@dataclass(eq=False)
class MemberView:
    """What the units of one kind in one block have of one matrix of their dependency group, [U, R, other].

    R of its rows (of its columns, in the output projection) belong to every unit, consecutive ones.

    Attributes:
        weight: float32.
        gradient: float32, the mean over calibration sequences of the dense model's gradient, where "gradient_mean"
            was asked for.
        square: float32, the mean of its square, where "gradient_square" was asked for.
    """

    weight: Tensor
    gradient: Tensor | None = None
    square: Tensor | None = None


@dataclass(eq=False)
class UnitView:
    """The removable units of one kind in one block, seen at the input of their output projection.

    Attributes:
        kind: "heads" (whole key-value groups) or "channels" (neurons of the MLP).
        stored: [out, in] of the output projection, as the model has it.
        width: consecutive inputs per unit: r·e for a group of r query heads of width e, 1 for a channel.
        heads: query heads per unit (r); 1 for channels.
        cost: parameters of one unit.
        norm: float32 [in], L2 norms of the projection's inputs over all calibration tokens, if asked for.
        absolute: float32 [in], the mean magnitude of the projection's inputs, if asked for.
        gram: float32 [in, in], (2 / sequences) · Σ x xᵀ of the projection's inputs, if asked for.
        mean, variance, fluctuation: float32 [in], of the projection's inputs over the calibration set, if asked
            for; the fluctuation is the recurrence of FLAP's code (`core.statistics.Moments`).
        sensitivity: float32 [in], the square of the mean over tokens of the dense model's loss's gradient at the
            projection's inputs, summed over calibration sequences, if asked for.
        usage: float32 [U], for how many tokens a router took each, of a method that is `routed`.
        members: the matrices that lose entries with a unit, read one by one: those that feed the units in the order of
            the block's modules (q, k, v; gate, up), at last the output projection.
    """

    kind: str
    stored: Tensor
    width: int
    heads: int
    cost: int
    norm: Tensor | None = None
    absolute: Tensor | None = None
    gram: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None
    fluctuation: Tensor | None = None
    sensitivity: Tensor | None = None
    usage: Tensor | None = None
    members: Callable[[], Iterator[MemberView]] = lambda: iter(())

    @property
    def weight(self) -> Tensor:
        """float32 [out, in] of the output projection; in low precision made anew whenever it is asked for."""
        return self.stored.float()

    @property
    def count(self) -> int:
        """U, how many units."""
        return self.stored.shape[1] // self.width


@dataclass(eq=False)
class ExpertView:
    """The experts of one block, and what the router made of the calibration tokens.

    Attributes:
        count: E, how many.
        cost: prunable weights of one.
        uses: float64 [E], how many tokens went to each.
        worth: float64 [E], the sum of their routing weights.
        neurons: of some experts, read when they are asked for: float32 [experts, M, 3 D], a neuron's row of gate, its
            row of up and its column of down.
        dtype: that the model has them in.
    """

    count: int
    cost: int
    uses: Tensor
    worth: Tensor
    neurons: Callable[[Sequence[int]], Tensor]
    dtype: torch.dtype


@dataclass(eq=False)
class BlockView:
    """One block: its units, its size and how much it changes the residual stream.

    Attributes:
        index: which block.
        parameters: its prunable parameters.
        units: by kind.
        experts: where the method looks at them and the block has some.
        halves: prunable parameters of its "attention" and its "mlp", for methods with the unit "halves".
        similarity, angle: mean over tokens of the cosine, and of the angle as a part of π, between the residual stream
            before and after the block, if asked for.
        contrast: the loss of what is read behind the block as embeddings of triples of texts, if asked for.
        sensitivity: float32 [D], of the residual stream behind the block, as `UnitView.sensitivity`.
        entering, leaving: float32 [N, D], the residual stream at the last token of each calibration sequence (of an
            image at its class token) before and after the block, if statistics of dense blocks were asked for.
    """

    index: int
    parameters: int
    units: dict[str, UnitView] = field(default_factory=dict)
    experts: ExpertView | None = None
    halves: dict[str, int] = field(default_factory=dict)
    similarity: float | None = None
    angle: float | None = None
    contrast: float | None = None
    sensitivity: Tensor | None = None
    entering: Tensor | None = None
    leaving: Tensor | None = None

    def removable(self) -> dict[str, UnitView | ExpertView]:
        """What a method may remove of the block, by kind."""
        return self.units if self.experts is None else {**self.units, "experts": self.experts}


Place = tuple[int, str]
"""A block, and a kind of unit in it."""


@dataclass(eq=False)
class Sublayer:
    """What is known of the units at one place of an encoder, and behind it, once those before it are pruned.

    Attributes:
        features: float32 [T, in], of every token what the output projection reads.
        target: float32 [T, out], what its product with the weight should be for the dense model's residual stream.
        answers: by place float32 [in], half the squared gradient of the answers' divergence from the dense model's.
        squares: by place float32 [in], the mean square of what the projection reads.
    """

    features: Tensor
    target: Tensor
    answers: dict[Place, Tensor]
    squares: dict[Place, Tensor]


@dataclass(eq=False)
class Trajectory:
    """What an encoder computes on its way.

    Attributes:
        features: float32 [T, D], by block, what its MLP makes of every token before the residual stream is added.
        answers: logits [N, C]; None of an encoder without classes.
    """

    features: dict[int, Tensor]
    answers: Tensor | None


@dataclass(eq=False)
class ModelView:
    """All blocks with their statistics, for methods that decide over the whole model.

    Attributes:
        blocks: in order.
        uniform: whether all blocks must keep the same number of units of a kind (`--loadable plain`).
        losses_with: (made, candidates) -> float64 [C], the model's mean loss per calibration token with the edits
            `made` and those of each candidate in turn; for methods with `measures`. Edits of one block add up.
        seen_with: edits -> all blocks with the statistics that they have under these edits; for methods with
            `measures` that read statistics. Units and weights are those of the whole model.
        strayed_with: (candidates, measure) -> float64 [C, ...], of an encoder: what `measure` says of the dense model's
            trajectory and that with the edits of each candidate in turn; for methods with `measures`. The latter begins
            at the first block that is edited.
        teacher: sequences per pass -> the dense model (`models.teacher.Teacher`), for methods with `teacher`.
        seed: of all that a method draws.
    """

    blocks: list[BlockView]
    uniform: bool = False
    losses_with: Callable[[Sequence[StructureEdit], Sequence[Sequence[StructureEdit]]], Tensor] | None = None
    seen_with: Callable[[Sequence[StructureEdit]], list[BlockView]] | None = None
    strayed_with: (
        Callable[[Sequence[Sequence[StructureEdit]], Callable[[Trajectory, Trajectory], Tensor]], Tensor]
        | None
    ) = None
    teacher: Callable[[int], Any] | None = None
    seed: int = 0
