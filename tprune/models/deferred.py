"""What a cache keeps of tokens that left inside a decoder, so that they may come back (LazyLLM's auxiliary cache)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from tprune.errors import UserError

Slots = tuple[Tensor, Tensor]
"""int64 [B, T], the tokens that some layers have cached, in the order of their caches, and which are no fillers."""


@dataclass(frozen=True, eq=False)
class Deferred:
    """How to go on with the tokens of one prompt; a value, so that copies of a cache may share it.

    Attributes:
        hidden: [B, P + 1, D], every token of the prompt as it entered the first layer that has not cached it; the last
            row is nobody's.
        ids: int64 [B or 1, P], the prompt's position ids; None where layers are not given any.
        prunable: int64 [B], how many tokens of the prompt could leave.
        counts: by the layer before which tokens leave, how many of them stayed: int64 [B].
        held: by the same layers, what they and those behind them, up to the next, have cached.
    """

    hidden: Tensor
    ids: Tensor | None
    prunable: Tensor
    counts: dict[int, Tensor]
    held: dict[int, Slots]

    @property
    def nbytes(self) -> int:
        """The hidden states."""
        return self.hidden.nbytes

    def keep(self, slots: Tensor, real: Tensor, hidden: Tensor) -> Deferred:
        """With these tokens [B, M] as they are now, `hidden` [B, M, D]; those that are not `real` are left out."""
        place = torch.where(real, slots, self.hidden.shape[1] - 1)
        return replace(self, hidden=self.hidden.scatter(1, place.unsqueeze(2).expand_as(hidden), hidden))

    def hold(self, layer: int, slots: Tensor, real: Tensor) -> Deferred:
        """With these tokens [B, R] in the caches from `layer` on."""
        held = self.held[layer]
        return replace(
            self,
            held=self.held | {layer: tuple(torch.cat(x, 1) for x in zip(held, (slots, real), strict=True))},
        )

    def count(self, layer: int, candidates: Tensor) -> Tensor:
        """The part of so many, int64 [B], that the prompt's part before `layer` is: int64 [B]."""
        return (self.counts[layer] * candidates * 2 + self.prunable) // (2 * self.prunable).clamp_min(1)

    def each_row(self, change: Callable[[Tensor], Tensor]) -> Deferred:
        """With `change` applied to the rows of everything."""
        ids = self.ids if self.ids is None or len(self.ids) == 1 else change(self.ids)
        return Deferred(
            change(self.hidden),
            ids,
            change(self.prunable),
            {layer: change(count) for layer, count in self.counts.items()},
            {layer: (change(slots), change(real)) for layer, (slots, real) in self.held.items()},
        )


class DeferringLayer(DynamicLayer):
    """The cache of the first layer before which tokens left; what is `stored` with it goes where its rows go."""

    stored: Deferred | None = None

    @classmethod
    def adopt(cls, layer: DynamicLayer, stored: Deferred) -> DeferringLayer:
        """A layer with the entries of `layer`.

        Raises:
            UserError: another kind of layer, whose entries something else decides about.
        """
        if type(layer) not in (DynamicLayer, cls):
            raise UserError(
                f"tokens cannot come back to a {type(layer).__name__} of a cache: pass a DynamicCache that nothing "
                "else prunes, or --set revive=false"
            )
        new = cls()
        new.__dict__.update(layer.__dict__, stored=stored)
        return new

    def reset(self) -> None:
        """Empty, as new."""
        super().reset()
        self.stored = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in a new order, for beam search."""
        super().reorder_cache(beam_idx)
        self._each_row(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row several times."""
        super().batch_repeat_interleave(repeats)
        self._each_row(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        super().batch_select_indices(indices)
        self._each_row(lambda x: x[indices.to(x.device)])

    def _each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.stored is not None:
            self.stored = self.stored.each_row(change)
