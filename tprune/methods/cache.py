"""What a method that prunes cached keys and values declares, is given and gives back; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tprune.errors import BudgetError, UserError
from tprune.methods.base import Method, param

if TYPE_CHECKING:
    from torch import Tensor

    from tprune.core.cache import Evict, Replace
    from tprune.core.stored import Encode
    from tprune.methods.cache_view import LayerView, Projections, StepView
    from tprune.methods.fit import Fit


@dataclass(frozen=True)
class CacheShape:
    """What a cache method may know of a decoder before it runs.

    Attributes:
        depth: number of layers.
        places: those whose cache can be pruned, ascending.
        heads: query heads of one.
        width: D, of a token's hidden state.
        base: of the rotary embeddings' frequencies.
        projections: how every layer whose cache can be pruned makes keys and values of its inputs, for methods that
            read "inputs".
    """

    depth: int
    places: tuple[int, ...]
    heads: int
    width: int
    base: float
    projections: Mapping[int, Projections]


@dataclass(frozen=True)
class Probe:
    """What a method asks a model for a moment, so that its attention says what it would need of the text so far.

    Attributes:
        instruction: text that goes through the model behind all it has seen; its last token is the one that looks.
        every: it is asked behind the prompt, and again after so many later tokens.
        words: with what a passage of the text begins; the first token of each counts.
        breaks: behind what a passage ends; the last token of each counts.
        opening: what the text to prune begins with, where the model has a token for it: nothing leaves before its last.
    """

    instruction: str
    every: int
    words: tuple[str, ...]
    breaks: tuple[str, ...]
    opening: str


@dataclass(frozen=True)
class CacheMethod(Method):
    """Units are cached keys and values, per layer and key-value head.

    The budget is set by the first prompt on a cache, which is pruned once it has gone through the model: `count` of
    its entries stay. All that comes later on the same cache, generated or given (a second turn's question), counts as
    generated tokens. It is never pruned as a prompt: with methods that evict while decoding every one of these tokens
    pushes an entry out, of the first prompt or later, and the cache keeps its size; with others they all stay, and
    it grows. Positions go on from the number of tokens seen.
    """

    positions: ClassVar[str] = "original"
    reads: ClassVar[tuple[str, ...]] = ("attention",)
    """What is read and costs something to provide: "attention" (by `step`), "seeds" and "turning" (by `start`)
    and "inputs"."""

    takes: ClassVar[tuple[str, ...]] = ("per_head", "interval")
    """Which of the hyperparameters of these names make sense: both where entries are chosen by a score alone."""
    encodes: ClassVar[bool] = False
    """Whether it holds entries in another form and forgets none; its budget is then bytes."""
    forgets: ClassVar[bool] = True
    """Whether memory falls with the budget; without it only the part of the entries does that a later token reads."""

    chooses: ClassVar[bool] = False
    """Whether every query, the prompt's too, chooses which of its keys it reads (`foresee`, `choose`) and nothing is
    forgotten; its budget is then the part of the keys that are read."""

    pyramid: float | None = param(
        None, "budgets fall from layer to layer, to one part in so many of the mean", low=1, kw_only=True
    )
    per_head: float | None = param(
        None,
        "heads share a layer's budget by their scores, each has this part of an equal share for certain (Ada-KV: "
        "0.2); nothing leaves while decoding",
        low=0,
        high=1,
        kw_only=True,
    )
    interval: int | None = param(
        None,
        "after so many generated tokens the cache is pruned again to its budget, by what they looked at, and not at "
        "each token",
        low=1,
        kw_only=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pyramid is not None and self.chooses:
            raise UserError(
                f"--set pyramid=…: the queries of {self.id} choose in all layers alike; leave it out"
            )
        for name in ("per_head", "interval"):
            if getattr(self, name) is not None and name not in self.takes:
                raise UserError(f"--set {name}=…: {self.id} does not go by scores alone; leave it out")
        if self.per_head is not None and self.interval is not None:
            raise UserError(
                "--set per_head=… and interval=…: heads that hold different numbers are pruned once; give one of them"
            )

    @property
    def evicts_while_decoding(self) -> bool:
        """Whether entries leave at each generated token, and not only after the prompt.

        Methods that can do either have a hyperparameter `decode`, which decides.
        """
        can = type(self).step is not CacheMethod.step and getattr(self, "decode", True)
        return can and self.per_head is None and self.interval is None

    def keep_best(
        self, layer: LayerView, score: Tensor, count: int, first: int = 0, last: int = 0
    ) -> Evict | Encode:
        """The `first` and the `last` entries, and those between of the largest scores [B, G, T]: `count` per head.

        With `per_head` the heads share so many each by their scores, which are then not negative.
        """
        from tprune.core.by_head import keep_by_head
        from tprune.core.cache import Evict
        from tprune.core.select import keep_ends_and_top

        if self.per_head is None or count == layer.length:
            return Evict(keep_ends_and_top(score, count, first, last))
        return keep_by_head(layer.key, layer.value, score, count, first, last, self.per_head)

    def probe(self) -> Probe | None:
        """What `start` wants to have asked; it is then called behind each asking, and not behind the prompt alone."""
        return None

    def check_length(self, length: int, count: int) -> None:
        """Raise UserError where `count` entries of a prompt of `length` tokens are too few; count < length."""

    def counts(self, length: int, layers: int, keep: float) -> list[int]:
        """How many entries each layer keeps per key-value head, of `length`: the same in all without a pyramid."""
        from tprune.core.budget import falling_counts

        if self.pyramid is None or keep == 1:
            return [round(keep * length)] * layers
        return falling_counts(keep * length, length - 1, layers, self.pyramid)

    def planned(self, length: int, layers: int, keep: float) -> list[int]:
        """`counts`, where there can be so many.

        Raises:
            BudgetError: the request rounds to nothing or to all, or is too small for the method.
        """
        counts = self.counts(length, layers, keep)
        if keep == 1:
            return counts
        asked = f"--keep {keep:g} of a prompt of {length} tokens rounds to"
        for count in counts:
            if count < 1:
                least = 1 / length
                raise BudgetError(f"{asked} no entry at all; ask for --keep {least:.2g} or more", least, 1.0)
            if min(counts) >= length:
                raise BudgetError(f"{asked} keeping them all; ask for less, or 1")
            if count < length and (error := self._lacks(length, count)) is not None:
                enough = (more for more in range(count + 1, length) if self._lacks(length, more) is None)
                raise BudgetError(str(error), next(enough, length) / length, 1.0)
        return counts

    def _lacks(self, length: int, count: int) -> UserError | None:
        """Why the method cannot do with `count` entries of a prompt of `length` tokens; None where it can."""
        try:
            self.check_length(length, count)
        except UserError as error:
            return error
        return None

    def fit(self, shape: CacheShape, keep: float, seed: int) -> Fit:
        """The method in training (`learns` is not "no"); `at` gets a `LayerView` of every layer that can be pruned.

        What `at` gives, if anything, [B, 1, N, N], is added to the layer's logits; it hides later tokens, too.

        Args:
            shape: of the model.
            keep: the budget.
            seed: of initial values.
        """
        raise NotImplementedError

    def neutral_state(self, shape: CacheShape, seed: int) -> dict[str, Tensor]:
        """What `state` is before any step of a fit, for contract tests and measurements of time."""
        return self.fit(shape, 0.5, seed).state()

    def foresee(
        self, shape: CacheShape, inputs: Tensor, position: Tensor, visible: Tensor, memory: dict[str, Tensor]
    ) -> Any:
        """Before the first layer attends, where `chooses`: what `choose` shall be given.

        Args:
            shape: of the model.
            inputs: [B, q, D], what the first layer's attention is given for the tokens that come.
            position: int64 [B, q], of these.
            visible: bool [B or 1, 1, q, T], what each may see of all tokens so far.
            memory: what the method keeps with a cache, [B, H, T, d] by name: every token that comes is added to it.
        """
        raise NotImplementedError

    def choose(
        self,
        shape: CacheShape,
        layer: int,
        foreseen: Any,
        visible: Tensor,
        keep: float,
        memory: dict[str, Tensor],
    ) -> Tensor:
        """Which keys the queries that came read in a layer, bool [B, H or 1, q, T], of the `visible` ones."""
        raise NotImplementedError

    def start(self, layer: LayerView, count: int) -> Evict | Encode:
        """After the prompt went through `layer`: which `count` entries stay (all of them at --keep 1).

        Or in which other form they are held, in the memory of `count` of them.
        """
        raise NotImplementedError

    def step(self, view: StepView) -> Replace:
        """After each later token: which entry leaves for it; never asked at --keep 1. Without it they all stay."""
        raise NotImplementedError
