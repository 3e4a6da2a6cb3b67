"""The contracts: what a method declares, what it is given, what it gives back.

A method is a frozen dataclass: its fields are the paper's hyperparameters with the paper's defaults, each
made by `param` with one line of help. It names its `paper` and composes functions of `tprune.core`; it never
reaches into a model. This module imports no torch, so that methods can be listed at once.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tprune.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tprune.core.budget import Site, Stage
    from tprune.core.cache import Evict, Replace
    from tprune.core.reduction import Reduction
    from tprune.core.stored import Encode
    from tprune.core.weights import WeightEdit
    from tprune.methods.fit import Fit
    from tprune.methods.views import Attention, LayerView, LinearView, ModelView, StepView, TokenView


@dataclass(frozen=True)
class Paper:
    """Where a method comes from and how it was checked.

    Attributes:
        title, venue, year: of the paper; a baseline without one says what it is.
        arxiv: identifier without prefix, or None.
        code: the authors' repository, or None where none is public.
        checked: "code" (golden values from the authors' code), "port" (from a public re-implementation),
            "paper" (from the formulas alone) or "abstract" (a reconstruction of what the abstract commits to).
        notes: where this implementation differs, in one or two sentences.
    """

    title: str
    venue: str
    year: int
    arxiv: str | None = None
    code: str | None = None
    checked: str = "paper"
    notes: str = ""


def param(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    length: int | None = None,
    kw_only: bool = False,
) -> Any:
    """A hyperparameter: its default, one line of help, the values it may take (inclusive bounds), and how many."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "length": length}
    return dataclasses.field(default=default, metadata=metadata, kw_only=kw_only)


class State(dict[str, Any]):
    """Learned tensors by name; equal only to itself, so that methods that learned differently differ."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


@dataclass(frozen=True)
class Method:
    """Every method: hyperparameters and where it comes from.

    Attributes:
        state: what was learned, for methods that learn (`bind`); None before.
    """

    paper: ClassVar[Paper]
    kind: ClassVar[str] = "training-free"
    id: ClassVar[str] = ""
    family: ClassVar[str] = ""
    learns: ClassVar[str] = "no"
    """Whether there is something to fit: "no", "optional" (it runs without) or "required"."""
    labels: ClassVar[str] = "classes"
    """What a fit learns from: the "classes" of images, or what their "patches" show."""
    built_in: ClassVar[dict[str, Any]] = {}
    """Training hyperparameters for `--fit built-in`, where the paper's need more images than there are."""

    state: State | None = dataclasses.field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in self.hyperparameters():
            value = _typed(field.name, getattr(self, field.name), hints[field.name], field.metadata)
            object.__setattr__(self, field.name, value)

    @classmethod
    def build(cls, settings: dict[str, Any]) -> Method:
        """The method with these hyperparameters; values may be strings, as from a command line.

        Raises:
            UserError: an unknown name, or a value of the wrong type or out of bounds.
        """
        known = [field.name for field in cls.hyperparameters()]
        for name in settings:
            if name.replace("-", "_") not in known:
                offer = ", ".join(known) or "none"
                raise UserError(f"{cls.id} has no hyperparameter '{name}'; it has: {offer}")
        return cls(**{name.replace("-", "_"): value for name, value in settings.items()})

    def settings(self) -> dict[str, Any]:
        """The hyperparameters and their values, as a recipe stores them."""
        values = {field.name: getattr(self, field.name) for field in self.hyperparameters()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def hyperparameters(cls) -> list[dataclasses.Field]:
        """The fields that a recipe stores."""
        return [field for field in dataclasses.fields(cls) if field.name != "state"]

    def bind(self, tensors: typing.Mapping[str, Tensor]) -> typing.Self:
        """The same method with what was learned."""
        return dataclasses.replace(self, state=State(tensors))

    def check_pairs(self, one: str, other: str) -> None:
        """Raise UserError where two hyperparameters that go together in pairs are not of one length."""
        first, second = len(getattr(self, one)), len(getattr(self, other))
        if first != second:
            raise UserError(f"{self.id}: {first} {one} and {second} {other}; give as many of each")

    def check_fit(self, fit: str | None) -> None:
        """Refuse to fit what learns nothing, and to run unfitted what must learn first."""
        if fit is not None and self.learns == "no":
            raise UserError(f"--fit {fit}: {self.id} learns nothing; leave it out")
        if fit is None and self.state is None and self.learns == "required":
            raise UserError(
                f"{self.id} must be trained: add --fit DATA (--fit built-in for the digit scenes), or run a "
                "folder that was fitted"
            )


BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _typed(name: str, value: Any, hint: Any, limits: typing.Mapping[str, Any]) -> Any:
    """`value` as the type of the annotation `hint`, within `limits`, or a UserError that says what it may be."""
    try:
        value = _convert(value, hint)
    except (TypeError, ValueError, KeyError):
        shown = getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)
        raise UserError(f"--set {name}={value}: expected {shown}") from None
    choices, low, high = limits.get("choices"), limits.get("low"), limits.get("high")
    if choices is not None and value not in choices:
        raise UserError(f"--set {name}={value}: expected one of {', '.join(map(str, choices))}")
    length = limits.get("length")
    if length is not None and len(value) != length:
        raise UserError(f"--set {name}={','.join(map(str, value))}: expected {length} values")
    low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
    for number in value if isinstance(value, tuple) else (value,):
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if is_number and not low <= number <= high:
            raise UserError(f"--set {name}={value}: expected {low} to {high}")
    return value


def _convert(value: Any, hint: Any) -> Any:
    """`value` as `hint`: bool, int, float, str, `tuple[T, ...]` or `T | None`; strings are parsed."""
    arguments = typing.get_args(hint)
    if type(None) in arguments:
        if value is None or value == "none":
            return None
        return _convert(value, next(kind for kind in arguments if kind is not type(None)))
    if typing.get_origin(hint) is tuple:
        items = (
            value.split(",")
            if isinstance(value, str)
            else value
            if isinstance(value, tuple | list)
            else (value,)
        )
        return tuple(_convert(item, arguments[0]) for item in items)
    if hint is bool:
        return value if isinstance(value, bool) else BOOLEANS[str(value).lower()]
    if hint is int and (isinstance(value, bool) or (isinstance(value, float) and value != int(value))):
        raise ValueError
    return hint(value)


@dataclass(frozen=True)
class Shape:
    """What a token method may know of a model before it runs.

    Attributes:
        depth: number of blocks the tokens pass through.
        tokens: number of prunable tokens of one sequence.
        prefix: number of tokens that are never pruned (CLS, distillation, registers, a detector's queries); a view
            shows them in front.
        heads: attention heads of one block.
        has_cls: whether the first token is a class token.
        grid: rows and columns of the prunable tokens, where they form an image.
        width: of a token's hidden state.
        classes: how many the model tells apart; 0 for a bare tower.
        patch: channels, rows and columns of the pixels that one prunable token stands for, where it is an image.
        names: how many things a patch may show in the data of a fit, the background included; 0 where it does not say.
        kind: "plain" (every token sees every other), "windows" (attention within windows) or "state-space".
        window: rows and columns of a window, where `kind` is "windows".
        span: the first block before which tokens may leave and the one behind the last, where it is not all of them.
        lengths: how many tokens each block has where nothing leaves, where they differ; `tokens` is what it is in
            `span`.
    """

    depth: int
    tokens: int
    prefix: int = 0
    heads: int = 1
    has_cls: bool = False
    grid: tuple[int, int] | None = None
    width: int = 0
    classes: int = 0
    patch: tuple[int, int, int] = (0, 0, 0)
    names: int = 0
    kind: str = "plain"
    window: int = 0
    span: tuple[int, int] | None = None
    lengths: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TokenMethod(Method):
    """Units are tokens of one sequence, in a ViT, before or inside a VLM's decoder, or in an LLM's prefill."""

    needs_cls: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ("attention",)
    """What of the view is read and costs something to provide: "attention", "encoder", "projector", "seeds",
    "sublayers", "neurons", "embeddings", "before" (what the layer before a site was given)."""
    unit: ClassVar[str] = "image"
    """What a view holds at a VLM's projector: a whole "image", or each "crop" of it by itself."""
    native: ClassVar[tuple[str, ...]] = ()
    """The hyperparameters that are themselves a budget; --keep takes their place, so both is a contradiction."""
    under_keep: ClassVar[dict[str, Any]] = {}
    """What hyperparameters are under --keep, so that it fixes all counts; with other values the data decides."""
    positions: ClassVar[str] = "original"
    """Whether tokens that stay keep their "original" position ids, or are renumbered to be "compact"."""
    positions_inside: ClassVar[str | None] = None
    """The same for what leaves inside a VLM's decoder, where it differs from what leaves at the projector."""
    projects: ClassVar[bool] = False
    """Whether tokens are merged before a VLM's projector: the view then holds what the projector makes tokens of, class
    tokens in front, and what is merged is projected again."""
    calibrates: ClassVar[bool] = False
    """Whether `state` comes from a look at `images` calibration images, before anything is pruned or fitted."""
    restores: ClassVar[bool] = False
    """Whether all that left is back after the last block, with the values it left with; `finish` is called before."""
    runs_on: ClassVar[tuple[str, ...]] = ("plain",)
    """The kinds of vision model it works in (`Shape.kind`)."""
    sees: ClassVar[bool] = False
    """Whether its reductions may say what the next attention sees (`core.reduction.Sight`)."""

    def check(self, shape: Shape) -> None:
        """Raise UserError where the model lacks what the method reads."""
        if self.needs_cls and not shape.has_cls:
            raise UserError(f"{self.id} reads the attention of the class token, and this model has none")

    def encoder_blocks(self, depth: int) -> Sequence[int]:
        """The blocks of a vision tower of so many that are seen beside the projected one (reads "encoder")."""
        return ()

    def tower_blocks(self, depth: int, projected: int) -> Sequence[int]:
        """The blocks of a vision tower, ascending, behind which leaves what leaves at the projector, where the tower
        allows it (unit "crop"); none: behind the tower. It has `depth`, and `projected` is the one that is projected.

        `reduce` is asked behind each of them with the same `memory`, and at the projector again, for the same.
        """
        return ()

    def stages(self, shape: Shape, knob: float | None) -> list[Stage]:
        """Where tokens leave and how many are left.

        Args:
            shape: the model and the number of prunable tokens.
            knob: 0 to 1, the paper's proportions scaled so that more is kept as it rises and 1 keeps all;
                None for the hyperparameters as they stand.
        """
        raise NotImplementedError

    def weighs_by_size(self) -> bool:
        """Whether attention after a merge counts a token as often as the tokens it stands for (log-size bias)."""
        return False

    def watches(self, depth: int) -> Sequence[int]:
        """The decoder's layers whose attention `watch` is shown, in prompts and behind them (reads "attention")."""
        return ()

    def watch(
        self, layer: int, attention: Attention, image: Tensor, total: int, memory: dict[str, Any]
    ) -> None:
        """Look at a layer that `watches` names.

        Args:
            layer: which.
            attention: of the prompt, or of what came behind it, over all T keys of the layer.
            image: int64 [B, T], which of its row's image tokens each key is, counted from 0; -1 for all else.
            total: how many image tokens the row with the most of them had.
            memory: lasts from prompt to prompt until `reset` of the handle; `reduce` has it as `memory["episode"]`.
        """
        raise NotImplementedError

    def hides(self) -> bool:
        """Whether what leaves inside a decoder is hidden from attention, and goes on being computed and cached."""
        return False

    def evicts(self) -> bool:
        """Whether image tokens leave each layer's cache, per key-value head, once the prompt has gone through in full.

        `worth` and `counts` are then asked, and never `reduce`; a stage says how many entries stay from its layer on.
        """
        return False

    def worth(self, attention: Attention, image: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer's entries are worth, larger is better: [B, G, T]; and what `counts` wants to know of it: [B].

        Args:
            attention: of the whole prompt.
            image: bool [B, T], the image tokens.
            last: int64 [B, 1], the place of each row's last real token.
        """
        raise NotImplementedError

    def counts(self, facts: Tensor, images: Tensor, wanted: Tensor | None) -> Tensor:
        """How many image entries every head of each layer keeps: int64 [L, B].

        Args:
            facts: [L, B], of `worth`.
            images: int64 [B], how many image tokens each row has.
            wanted: int64 [B], what stays where the stages say so, a mean over the layers from the stage's on; None for
                the hyperparameters as they stand.
        """
        raise NotImplementedError

    def edits_attention(self) -> bool:
        """Whether blocks that tokens leave use an attention map that the method has changed."""
        return False

    def edit_attention(self, attention: Tensor) -> Tensor:
        """The map that such a block uses instead of its own softmaxed one, float32 [B, H, N, N]."""
        raise NotImplementedError

    def decays(self) -> bool:
        """Whether a state-space model's state goes on decaying over the places of tokens that have left."""
        return False

    def skip_scale(self) -> float:
        """What a block multiplies its input by where a stage skips its attention, before the MLP adds to it."""
        return 1.0

    def calibrate(
        self, shape: Shape, keep: float | None, outputs: Callable[[Sequence[int]], Tensor]
    ) -> dict[str, Tensor]:
        """What `state` shall be, where `calibrates`.

        Args:
            shape: of the model.
            keep: the budget, as `--keep` means it; None for the hyperparameters as they stand.
            outputs: what the model makes of the calibration images while the attention of these blocks is skipped:
                float [S, C].
        """
        raise NotImplementedError

    def rejoins(self, shape: Shape) -> Site | None:
        """The site where all that left comes back with the values it left with; None: never.

        In a vision model it is the last of `stages`; in a decoder `reduce` is not asked there.
        """
        return None

    def counted(self) -> typing.Self:
        """The method under --keep, where `stages` fixes all counts: itself, unless the data decides without it."""
        return dataclasses.replace(self, **self.under_keep) if self.varies() else self

    def varies(self) -> bool:
        """Whether the data decides how many tokens each image keeps; `stages` then says how many at most."""
        return any(getattr(self, name) != value for name, value in self.under_keep.items())

    def check_budget(self, knob: float | None) -> None:
        """Raise UserError where nothing says how many stay: neither the data nor a budget."""
        if knob is None and not self.varies():
            fixed = ", ".join(f"{name}={value}" for name, value in self.under_keep.items()).lower()
            raise UserError(f"{self.id}: --set {fixed} leaves the numbers to --keep; give it a budget")

    def fit(self, shape: Shape, keep: float | None, seed: int) -> Fit:
        """The method in training (`learns` is not "no").

        Args:
            shape: of the model.
            keep: the budget, as `--keep` means it; None for the hyperparameters as they stand.
            seed: of initial values.

        Raises:
            UserError: a budget or hyperparameters that cannot be fitted to.
        """
        raise NotImplementedError

    def neutral_state(self, shape: Shape, seed: int) -> dict[str, Tensor]:
        """What `state` is before any step of a fit, for contract tests."""
        return self.fit(shape, 0.5, seed).state()

    def loosened(self, knob: float, shape: Shape) -> typing.Self:
        """The fitted method keeping more: 0 keeps least, 0.5 is as learned, 1 keeps all; for counts that vary."""
        raise NotImplementedError

    def reduce(
        self, site: Site, view: TokenView, count: int | Tensor, memory: dict[str, Any]
    ) -> Reduction | None:
        """What happens at `site`; None inside a decoder where all stay, for methods that only look there.

        Args:
            site: one of `stages`.
            view: the tokens and the signals of the block they come from.
            count: how many prunable tokens shall be left; int64 [B] on the CPU where rows differ.
            memory: what this forward carries from site to site; empty at its start.
        """
        raise NotImplementedError

    def finish(self, view: TokenView, memory: dict[str, Any]) -> None:
        """After the last block, of a method that `restores`: a look at what is left.

        A map of what all patches show goes into `memory["map"]`, probabilities [B, N, names].
        """


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
    """What is read and costs something to provide: "attention" (by `step`), "seeds" (by `start`)."""

    takes: ClassVar[tuple[str, ...]] = ("per_head", "interval")
    """Which of the hyperparameters of these names make sense: both where entries are chosen by a score alone."""
    encodes: ClassVar[bool] = False
    """Whether it holds entries in another form and forgets none; its budget is then bytes."""

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
        for name in ("per_head", "interval"):
            if getattr(self, name) is not None and name not in self.takes:
                raise UserError(f"--set {name}=…: {self.id} does not go by scores alone; leave it out")
        if self.per_head is not None and self.interval is not None:
            raise UserError(
                "--set per_head=… and interval=…: heads that hold different numbers are pruned once; give one of them"
            )

    @property
    def evicts_while_decoding(self) -> bool:
        """Whether entries leave at each generated token, and not only after the prompt."""
        return type(self).step is not CacheMethod.step and self.per_head is None and self.interval is None

    def keep_best(
        self, layer: LayerView, score: Tensor, count: int, first: int = 0, last: int = 0
    ) -> Evict | Encode:
        """The `first` and the `last` entries, and those between of the largest scores [B, G, T]: `count` per head.

        With `per_head` the heads share so many each by their scores, which are then not negative.
        """
        from tprune.core.cache import Evict
        from tprune.core.select import keep_ends_and_top
        from tprune.core.stored import keep_by_head

        if self.per_head is None or count == layer.length:
            return Evict(keep_ends_and_top(score, count, first, last))
        return keep_by_head(layer.key, layer.value, score, count, first, last, self.per_head)

    def check_length(self, length: int, count: int) -> None:
        """Raise UserError where `count` entries of a prompt of `length` tokens are too few; count < length."""

    def counts(self, length: int, layers: int, keep: float) -> list[int]:
        """How many entries each layer keeps per key-value head, of `length`: the same in all without a pyramid."""
        from tprune.core.budget import falling_counts

        if self.pyramid is None or keep == 1:
            return [round(keep * length)] * layers
        return falling_counts(keep * length, length - 1, layers, self.pyramid)

    def start(self, layer: LayerView, count: int) -> Evict | Encode:
        """After the prompt went through `layer`: which `count` entries stay (all of them at --keep 1).

        Or in which other form they are held, in the memory of `count` of them.
        """
        raise NotImplementedError

    def step(self, view: StepView) -> Replace:
        """After each later token: which entry leaves for it; never asked at --keep 1. Without it they all stay."""
        raise NotImplementedError


@dataclass(frozen=True)
class WeightBudget:
    """How much of a set of weights goes.

    Attributes:
        sparsity: fraction of the prunable weights removed, 0 to 1.
        pattern: (n, m), n kept of every m consecutive inputs; None for unstructured and structured pruning.
    """

    sparsity: float
    pattern: tuple[int, int] | None = None


@dataclass(frozen=True)
class WeightMethod(Method):
    """Units are weights, or the structures they form.

    A method of scope "block" is asked once per linear layer while the model streams by, and its decisions need
    nothing but that layer (`prune`). One of scope "model" is asked once, when the statistics of all
    blocks are known (`plan`).
    """

    scope: ClassVar[str] = "block"
    stats: ClassVar[tuple[str, ...]] = ()
    """What is gathered at the input of every linear layer: "norm", "gram", "moments"; per block "similarity"; or for
    every weight of the dense model, before anything is pruned, "gradient"."""
    units: ClassVar[tuple[str, ...]] = ()
    """The kinds of unit whose statistics a method of scope "model" reads: "heads", "channels"."""
    measures: ClassVar[bool] = False
    """Whether a method of scope "model" asks for the loss without some blocks (`ModelView.losses_without`)."""
    part: ClassVar[str] = "all"
    """Which matrices of a block a method of scope "block" prunes and its budget counts: "all", or the "mlp"'s."""
    groups_outputs: ClassVar[bool] = False
    """Whether groups of a pattern are consecutive outputs, not inputs, in matrices that feed the channels of an MLP."""
    propagate: ClassVar[str] = "pruned"
    """What feeds the next block's statistics: the "pruned" blocks before it, or the "dense" ones."""
    patterns: ClassVar[bool] = True
    """Whether n:m patterns are possible."""

    def score(self, linear: LinearView) -> Tensor:
        """What the weights of one linear layer are compared by, smallest first to go: float32 [out, in].

        For methods of scope "block" whose scores can be compared between layers.
        """
        raise NotImplementedError

    def prune(self, linear: LinearView, budget: WeightBudget, generator: torch.Generator) -> WeightEdit:
        """New weights of one linear layer (scope "block")."""
        raise NotImplementedError

    def plan(self, model: ModelView, budget: WeightBudget) -> list[WeightEdit]:
        """The edits of a whole model (scope "model")."""
        raise NotImplementedError
