"""How a method learns: what is learned, what happens at a site while it is, the loss, and what is kept of it.

A method that learns gives a `Fit` (`Method.fit`). The loop, the data, the optimizer, the checkpoints and the budget
are the same for all (`tprune.pipelines.fit`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tprune.core.budget import Site, mean_entering
from tprune.core.reduction import Reduction
from tprune.methods.token_view import TokenView
from tprune.methods.tokens import Shape


@dataclass(frozen=True)
class Plan:
    """How long and how fast: AdamW or SGD, linear warm-up, cosine or linear decay.

    Attributes:
        epochs: passes over the training images; fractions are allowed.
        batch: images per step, over all processes.
        lr: peak learning rate, of groups that have none of their own.
        floor: what is left of every learning rate at the end, as a fraction of its peak.
        warmup: fraction of the steps.
        weight_decay: of all groups that have none of their own.
        momentum: of SGD; None for AdamW.
        at_once: samples of a process that go through the model together; None for all of its step.
        linear: whether learning rates fall linearly to `floor`, not along a cosine.
        clip: the largest norm of all gradients together; None for any.
    """

    epochs: float
    batch: int
    lr: float
    floor: float = 0.0
    warmup: float = 0.0
    weight_decay: float = 0.0
    momentum: float | None = None
    at_once: int | None = None
    linear: bool = False
    clip: float | None = None


@dataclass(frozen=True, eq=False)
class Relaxed:
    """Tokens after a site at which none leaves.

    Attributes:
        hidden: [B, N, D].
        present: [B, N], 1 for tokens that would still be there, 0 for those that would not, with a gradient; it
            weighs the keys of the attention from here on.
        size: [B, N], how many tokens each stands for, or None.
        index: int64 [B, N], which token each slot was before, or None where the order is the same.
    """

    hidden: Tensor
    present: Tensor
    size: Tensor | None = None
    index: Tensor | None = None


class Fit(nn.Module):
    """A method in training. Its parameters are what is learned.

    A subclass sets `sites` and `plan`, and defines `at` and `state`; the rest where it differs.

    Attributes:
        depth: number of blocks.
        sites: where `at` is called.
        plan: how long and how fast.
        generator: of this step's random draws, on the tokens' device; the loop sets it.
    """

    tunes: ClassVar[str] = "nothing"
    """What of the model trains with it: "nothing", "all", or in a vision-language model "language": not its tower."""
    apart: ClassVar[bool] = False
    """Whether it learns from the pixels alone: the model does not run, and `memory["inputs"]` is all there is."""
    answers: ClassVar[bool] = True
    """Whether its losses read what the model says; where not, a language model's head does not run, and nothing of a
    decoder where tokens leave before it."""
    explains: ClassVar[bool] = False
    """Whether the maps of layers it watches are there to be differentiated by, though nothing before them learns."""
    teaches: ClassVar[bool] = False
    """Whether a text encoder as it was teaches it: `memory["teacher"]` is a function, inputs to the logits of that and
    the attention of its last block."""
    epsilon: ClassVar[float] = 1e-5
    keep_self: ClassVar[bool] = False
    """How attention weighs present tokens (`core.relax.mask_attention`)."""

    watches: tuple[int, ...] = ()
    """Layers of a decoder whose attention maps, float32 [B, H, N, N], are in `memory["attention"]` by layer; those of
    the dense model are in `memory["dense"]` once it has run."""

    depth: int
    sites: tuple[Site, ...]
    plan: Plan
    generator: torch.Generator

    def __init__(self, shape: Shape):
        super().__init__()
        self.depth = shape.depth

    def at(self, site: Site, view: TokenView, memory: dict[str, Any]) -> Reduction | Relaxed | Tensor:
        """What happens at `site`: tokens leave, tokens are marked, or become what a module made of them, [B, K, D].

        Args:
            site: one of `sites`.
            view: as the method's `reduce` gets it; `view.present` says what is still there.
            memory: what this forward carries from site to site and to `losses`.
        """
        raise NotImplementedError

    def begin(self, forwards: Iterator[dict[str, Any]]) -> None:
        """Before the first step, where initial values depend on the data: `forwards` gives the memories of forwards on
        the training data, one step's after another's and without an end; no gradient is asked for. Each has "inputs"
        and "again" as in `losses`.
        """

    def end(self, forwards: Iterator[dict[str, Any]]) -> None:
        """After the last step, the same once more."""

    def finish(self, view: TokenView, memory: dict[str, Any]) -> None:
        """After the last block, of a method that `restores`: as the method's `finish`."""

    def losses(
        self, outputs: Tensor, labels: Tensor, memory: dict[str, Any], dense: Any
    ) -> dict[str, Tensor]:
        """The parts of the loss by name; their sum is minimised.

        Args:
            outputs: the model's logits [B, C], of a vision-language model those at every token of the answers; None
                where it learns `apart`, or did not run to its end for lack of `answers`.
            labels: int64 [B], or the dense model's probabilities [B, C] where the data has none that fit; of a method
                that learns from patches, float [B, N, names], how much of every patch each name covers.
            memory: of this forward; "left" holds the fraction of tokens left after each site, "inputs" the images, or
                what a vision-language model is called with ("answers" beside it, which of the tokens are answers, bool
                [B, N], and "boxes" [B, n, 4] for a method with these labels), and "again" a function: the fitted
                model's logits for other inputs.
            dense: a function without arguments, the unpruned model's logits for the same inputs, with a gradient.
        """
        return {"task": functional.cross_entropy(outputs, labels)}

    def kept(self, memory: dict[str, Any]) -> Tensor:
        """What `--keep` means, of this forward: the mean fraction of tokens entering a sublayer, with a gradient."""
        return mean_entering(memory["left"], 1, self.depth)

    def blend(self, layer: int) -> tuple[float, float] | None:
        """(a, b) where block `layer` makes a·x + b·attention(x) of its input instead of x + attention(x)."""
        return None

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer; `lr` and `weight_decay` where they differ from the plan's."""
        return [{"params": [p for p in [*self.parameters(), *model.parameters()] if p.requires_grad]}]

    def settle(self, done: float) -> None:
        """After every step, and before the first of a resumed fit: `done` of it, above 0 and up to 1, is over."""

    def state(self) -> dict[str, Tensor]:
        """What is kept: the tensors that the method reads as `self.state`."""
        raise NotImplementedError
