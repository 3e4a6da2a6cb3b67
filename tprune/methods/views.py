"""What a method is given to look at: tokens, caches and weights, with their signals computed on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tprune.core import score, select
from tprune.core.weights import StructureEdit
from tprune.errors import UserError


@dataclass(eq=False)
class Attention:
    """The queries and keys of one block's attention as it ran, and what can be computed from them.

    The fused kernel stays in place; `rows` computes only the rows that are asked for, beside it.

    Attributes:
        query: [B, H, N, d], as the attention saw them (normalised, rotated).
        key, value: [B, G, N, d]; G divides H (grouped-query attention).
        scale: what the logits are multiplied with.
        bias: additive, broadcastable to [B, H, N, N] (log sizes, padding), or None.
        causal: whether row i sees only keys up to i.
        softcap: bounds the logits (Gemma 2), or None.
        map: float32 [B, H, N, N], the softmaxed attention, where it is there anyway: a method has edited it, or it is
            the single row of a generated token.
        output: [B, H, N, d], what every head read for every token, before the projection; None where it was not seen.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    bias: Tensor | None = None
    causal: bool = False
    softcap: float | None = None
    map: Tensor | None = None
    output: Tensor | None = None

    def rows(self, rows: Tensor | slice | None = None) -> Tensor:
        """Softmaxed attention of the query rows `rows` (all by default): float32 [B, H, R, N].

        `rows` is a slice, or int64 [R] for all samples, or [B, R].
        """
        if self.map is not None:
            return score.map_rows(self.map, rows)
        return score.attention_rows(
            self.query,
            self.key,
            self.scale,
            rows=rows,
            bias=self.bias,
            causal=self.causal,
            softcap=self.softcap,
        )

    def column_sums(self, decay: float = 1.0, counted: Tensor | None = None) -> Tensor:
        """The attention every key received, summed over the queries that see it: float32 [B, H, N].

        The last query counts 1, each one before it `decay` times the next; those that are not `counted`, bool [B, N],
        do not count.
        """
        if self.map is not None and decay == 1 and counted is None:
            return self.map.sum(2)
        return score.attention_column_sums(
            self.query,
            self.key,
            self.scale,
            bias=self.bias,
            causal=self.causal,
            softcap=self.softcap,
            decay=decay,
            counted=counted,
        )

    def window(self, size: int) -> Tensor:
        """What the last `size` queries paid to each key before them, summed: float32 [B, H, N - size]."""
        return score.window_attention(self.query, self.key, self.scale, size, softcap=self.softcap)


@dataclass(eq=False)
class TokenView:
    """The tokens at a site, and the attention of the block they came from.

    Attributes:
        hidden: [B, N, D], the residual stream.
        prunable: bool [B, N]; False for CLS, registers, padding, text.
        prefix: how many leading tokens are never prunable, the same in all rows; behind them everything is
            prunable where `whole` is set.
        depth: how many blocks the model has.
        has_cls: whether the first token is a class token.
        grid: rows and columns of the prunable tokens before any left, where they form an image.
        window: rows and columns of the windows that attention stays in; 0 where it does not.
        whole: whether all tokens behind the prefix are prunable (no host sync is needed to know it).
        position: int64 [B, N], every token's place in the original sequence.
        real: bool [B, N], False for padding; None where there is none.
        size: float [B, N], how many original tokens each stands for, or None before the first merge.
        attention: of the block these tokens last went through ("before" sites: the previous block's), if any.
        encoder: at a VLM's projector, the vision tower's view of the same images: [E, prefix + P] tokens behind the
            block that is projected. A row is a crop: E is B, or the sum over images of their crops.
        encoders: the same behind other blocks of the tower, by index (`TokenMethod.encoder_blocks`).
        pool: what the encoder's patches have [E, P, ...], for these tokens [B, N, ...]: the mean where several patches
            make one token, 0 for tokens that no patch makes (newlines).
        seeds: int64 per sample, for methods that draw at random: equal samples draw equally in any batch.
        present: float [B, N], while a method is fitted: 1 for tokens that would still be there, else 0, with a
            gradient; None before the first site that marks any.
        signals: rarer signals, by name, each computed at its first use.
    """

    hidden: Tensor
    prunable: Tensor
    prefix: int = 0
    depth: int = 0
    has_cls: bool = False
    grid: tuple[int, int] | None = None
    window: int = 0
    whole: bool = True
    position: Tensor | None = None
    real: Tensor | None = None
    size: Tensor | None = None
    attention: Attention | None = None
    encoder: TokenView | None = None
    encoders: dict[int, TokenView] = field(default_factory=dict)
    pool: Callable[[Tensor], Tensor] | None = None
    seeds: Tensor | None = None
    present: Tensor | None = None
    signals: dict[str, Callable[[], Any]] = field(default_factory=dict)

    @property
    def last(self) -> Tensor:
        """The place of every row's last real token, int64 [B, 1]."""
        if self.real is None:
            return self.prunable.new_full(
                (len(self.prunable), 1), self.prunable.shape[1] - 1, dtype=torch.int64
            )
        return self._places().mul(self.real).argmax(1, keepdim=True)

    @property
    def text(self) -> Tensor:
        """The instruction: real tokens behind the last prunable one, bool [B, N]."""
        behind = self._places() > self._places().mul(self.prunable).amax(1, keepdim=True)
        return behind if self.real is None else behind & self.real

    def received(self) -> Tensor:
        """What every token behind the prefix receives in this block, mean over heads and all queries: float32
        [B, N - prefix].
        """
        return (self.attention.column_sums().mean(1) / self.hidden.shape[1])[:, self.prefix :]

    def saliency(self) -> Tensor:
        """The class token's attention to every token behind the prefix, mean over heads: float32 [B, N - prefix];
        without a class token what they receive from all.
        """
        if not self.has_cls:
            return self.received()
        return self.attention.rows(slice(0, 1)).mean(1)[:, 0, self.prefix :]

    def askers(self) -> tuple[Tensor, Tensor]:
        """Where the instruction's tokens are, int64 [B, R], and which of these are real, bool [B, R]; the last token
        where no text stands behind the images.
        """
        text = self.text
        none = ~text.any(1, keepdim=True) & (self._places() == self.last)
        return select.places(text | none)

    def text_looks(self) -> tuple[Tensor, Tensor]:
        """What each token of the instruction pays to every token, mean over heads: float32 [B, R, N]; and which of
        these rows are real, bool [B, R], the others being 0 (`askers`).
        """
        rows, said = self.askers()
        paid = self.attention.rows(rows).mean(1)
        # Rows of padding, which see nothing, are NaN.
        return paid.masked_fill(~said.unsqueeze(2), 0), said

    def text_attention(self) -> Tensor:
        """What every token receives from the instruction (`text_looks`), mean over its tokens: float32 [B, N]."""
        paid, said = self.text_looks()
        return paid.sum(1) / said.sum(1, keepdim=True)

    def _places(self) -> Tensor:
        return torch.arange(self.prunable.shape[1], device=self.prunable.device)

    def signal(self, name: str) -> Any:
        """One of the rarer signals.

        Raises:
            UserError: this model or site does not have it.
        """
        if name not in self.signals:
            raise UserError(
                f"this model has no signal '{name}' here; it has: {', '.join(self.signals) or 'none'}"
            )
        return self.signals[name]()


@dataclass(eq=False)
class Projections:
    """How a layer makes keys and values of its inputs.

    Attributes:
        weights: () -> the projections' weights [C, D] and [E, D] in the model's own type; biases come in `finish`.
        finish: projected keys [B, t, C] and values [B, t, E] at positions int64 [B, t] as they are attended to: keys
            rotated, [B, G, t, d], and values [B, G, t, e].
        shared: what was computed from the weights, for all prompts.
    """

    weights: Callable[[], tuple[Tensor, Tensor]]
    finish: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    shared: dict[str, Any] = field(default_factory=dict)

    def project(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of inputs [..., D], before `finish`."""
        key, value = (inputs @ weight.mT for weight in self.weights())
        return key, value

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """`make()`, computed once."""
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]


@dataclass(eq=False)
class LayerView:
    """One layer's cache after the prompt went through it: one row or rows of equal length, without padding.

    Attributes:
        layer, depth: which of how many.
        attention: of the prompt's queries over the entries of the cache.
        key, value: [B, G, T, d], the cache; keys as the attention uses them (rotated).
        position: int64 [B, G, T], the place of every entry in its sequence, ascending.
        state: what the method carries to its later steps for this layer; empty now. A tensor [B, G, T] holds a number
            per entry and follows evictions, new entries start at zero; an int is for all rows, and becomes int64 [B]
            where the rows of a padded batch differ.
        seeds: int64 [B], for methods that draw at random.
        inputs: [B, T, D], what the keys and values were projected from by `projections`, and `begin`, int64 [B], the
            position of the first of them; for methods that read "inputs".
        probed: float32 [B, H, T], what the last token of a method's probe (`CacheMethod.probe`) paid to every entry.
        passage: int64 [B, T], in which passage of the text the entries stand, ascending, where no two heads hold
            different ones; -1 for what must stay.
    """

    layer: int
    depth: int
    attention: Attention
    key: Tensor
    value: Tensor
    position: Tensor
    state: dict[str, int | Tensor]
    seeds: Tensor | None = None
    inputs: Tensor | None = None
    begin: Tensor | None = None
    projections: Projections | None = None
    probed: Tensor | None = None
    passage: Tensor | None = None

    @property
    def groups(self) -> int:
        """G, how many key-value heads."""
        return self.key.shape[1]

    @property
    def length(self) -> int:
        """T, how many entries."""
        return self.key.shape[2]


@dataclass(eq=False)
class StepView:
    """Caches after a later token, before an entry of every key-value head leaves for it.

    Layers of equal size are stacked along the batch, so that B is layers · rows: choosing for all of them at once
    costs little more than for one. Rows that keep fewer entries begin with fillers.

    Attributes:
        attentions: per layer, of the new token's query over the entries.
        key, value: [B, G, T, d], the cache; the new entry is in the last slot.
        position: int64 [B, G, T], the place of every entry in its sequence, counted without padding; in any order
            but for the last slot's.
        fillers: how many leading entries of a row are fillers, to be kept and never read; int64 [B] where rows
            differ.
        state: what the method carries, see `LayerView`.
    """

    attentions: list[Attention]
    key: Tensor
    value: Tensor
    position: Tensor
    fillers: int | Tensor
    state: dict[str, int | Tensor]

    @property
    def groups(self) -> int:
        """G, how many key-value heads."""
        return self.position.shape[1]

    def attention_rows(self) -> Tensor:
        """What the new query pays to every entry: float32 [B, H, T]."""
        return torch.cat([attention.rows().squeeze(2) for attention in self.attentions])


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
        gram: float32 [in, in], (2 / sequences) · Σ x xᵀ, if asked for.
        output_gram: float32 [out, out], (2 / sequences) · Σ g gᵀ of the loss's gradients at the outputs, if asked for.
        gradient: float32 [out, in], the L2 norm over calibration sequences of the gradient of the dense model's loss,
            if asked for.
        likeness: the mean of the positive cosines between its outputs for two tokens of a sequence, if asked for.
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
    likeness: float | None = None
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
        weight: float32 [out, in] of the output projection.
        width: consecutive inputs per unit: r·e for a group of r query heads of width e, 1 for a channel.
        heads: query heads per unit (r); 1 for channels.
        cost: parameters of one unit.
        norm: float32 [in], L2 norms of the projection's inputs over all calibration tokens, if asked for.
        mean, variance, fluctuation: float32 [in], of the projection's inputs over the calibration set, if asked
            for; the fluctuation is the recurrence of FLAP's code (`core.statistics.Moments`).
        members: the matrices that lose entries with a unit, read one by one: those that feed the units in the order of
            the block's modules (q, k, v; gate, up), at last the output projection.
    """

    kind: str
    weight: Tensor
    width: int
    heads: int
    cost: int
    norm: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None
    fluctuation: Tensor | None = None
    members: Callable[[], Iterator[MemberView]] = lambda: iter(())

    @property
    def count(self) -> int:
        """U, how many units."""
        return self.weight.shape[1] // self.width


@dataclass(eq=False)
class BlockView:
    """One block: its units, its size and how much it changes the residual stream.

    Attributes:
        index: which block.
        parameters: its prunable parameters.
        units: by kind.
        halves: prunable parameters of its "attention" and its "mlp", for methods with the unit "halves".
        similarity, angle: mean over tokens of the cosine, and of the angle as a part of π, between the residual stream
            before and after the block, if asked for.
        entering, leaving: float32 [N, D], the residual stream at the last token of each calibration sequence before
            and after the block, if statistics of dense blocks were asked for.
    """

    index: int
    parameters: int
    units: dict[str, UnitView] = field(default_factory=dict)
    halves: dict[str, int] = field(default_factory=dict)
    similarity: float | None = None
    angle: float | None = None
    entering: Tensor | None = None
    leaving: Tensor | None = None


@dataclass(eq=False)
class ModelView:
    """All blocks with their statistics, for methods that decide over the whole model.

    Attributes:
        blocks: in order.
        uniform: whether all blocks must keep the same number of units of a kind (`--loadable plain`).
        losses_with: (made, candidates) -> float64 [C], the model's mean loss per calibration token with the edits
            `made` and those of each candidate in turn; for methods with `measures`. Edits of one block add up.
    """

    blocks: list[BlockView]
    uniform: bool = False
    losses_with: Callable[[Sequence[StructureEdit], Sequence[Sequence[StructureEdit]]], Tensor] | None = None
