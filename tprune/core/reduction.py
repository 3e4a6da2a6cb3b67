"""What a token method does to a sequence, as a value: a linear map over tokens in its cheapest exact form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows of `x` [B, N, ...] at `index` [B, K] along the token axis -> [B, K, ...].

    A channel-first memory layout stays one, so that later sums run in the same order as without pruning.
    """
    if x.dim() == 3 and not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
        return x.transpose(1, 2).gather(2, index.unsqueeze(1).expand(-1, x.shape[2], -1)).transpose(1, 2)
    if x.dim() > 2 and x.is_contiguous():
        # Whole rows at a time, which is ten times faster on a CPU than `gather`.
        first = torch.arange(x.shape[0], device=index.device).unsqueeze(1) * x.shape[1]
        return x.flatten(0, 1).index_select(0, (index + first).flatten()).view(*index.shape, *x.shape[2:])
    index = index.view(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:])
    return x.gather(1, index)


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """`x` [B, K, D], which is lost, with each row times its `weight` [B, K]."""
    weight = weight.unsqueeze(-1).to(x.dtype)
    return x * weight if weight.requires_grad else x.mul_(weight)


@dataclass(frozen=True, eq=False)
class Sight:
    """What the tokens that are left see in the next attention, where it is not all of themselves.

    Attributes:
        tokens: [B, M, D], what stands for the prunable tokens as keys and values (None: themselves).
        position: int64 [B, M], the place of each in the original sequence.
        queries, keys: int64 [G, q] and [G, m], groups of which each sees its keys alone: places among the tokens that
            are left, and among `tokens`, or again among those that are left; for sequences without a prefix (None: one
            group of all).
        adds: whether what attention gives is added to the tokens, as usual, or takes their place.
    """

    tokens: Tensor | None = None
    position: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    adds: bool = True


@dataclass(frozen=True, eq=False)
class Reduction:
    """A linear map over tokens, `out[b, j] = Σ_i M[b, j, i] · x[b, i]`.

    Slot j of the output is token `index[b, j]`, plus whatever flows into it. Four forms, cheapest first:

    - `keep`: a pure drop; nothing flows, `source` is None;
    - `merge`: the tokens `source[b, r]` flow into the slots `into[b, r]`, and slot j becomes
      `own[b, j] · x[index[b, j]] + Σ_r weight[b, r] · x[source[b, r]]`;
    - `spread`: every token of `source` flows into many slots, and slot j becomes
      `x[index[b, j]] + Σ_r dense[b, j, r] · x[source[b, r]]`;
    - `mix`: any matrix; `index` then names the token that stands for each slot (its position, its picture).

    Attributes:
        index: int64 [B, K], the original token of each slot, in the order the method wants the sequence in.
        length: N, how many tokens go in.
        source, into, weight: [B, R], the tokens that flow, the slots they flow to (-1: nowhere, the token is
            dropped, its weight is 0), and with which weight.
        own: [B, K], the weight of a slot's own token (None: 1).
        dense: [B, K, N], the matrix of a mix; [B, K, R] of a spread.
        valid: bool [B, K], False where a row keeps fewer tokens than K and the slot is padding (None: all real).
        resized: float [B, K], the sizes of the slots afterwards, where a method counts its own way (None: sums).
        made: [B, K, D], the values of the slots where they are no linear map of the tokens; the rest then says what
            each slot stands for.
        sight: what the slots see in the attention that follows, for methods that declare it (`TokenMethod.sees`).
    """

    index: Tensor
    length: int
    source: Tensor | None = None
    into: Tensor | None = None
    weight: Tensor | None = None
    own: Tensor | None = None
    dense: Tensor | None = None
    valid: Tensor | None = None
    resized: Tensor | None = None
    made: Tensor | None = None
    sight: Sight | None = None

    @classmethod
    def keep(cls, index: Tensor, length: int, valid: Tensor | None = None) -> Reduction:
        """Keep the tokens at `index` [B, K] of `length`, in that order; `valid` [B, K] marks the real slots."""
        return cls(index=index, length=length, valid=valid)

    @classmethod
    def identity(cls, batch: int, length: int, device: torch.device | str = "cpu") -> Reduction:
        """Keep every token in its place."""
        return cls.keep(torch.arange(length, device=device).expand(batch, length), length)

    @classmethod
    def merge(
        cls,
        index: Tensor,
        length: int,
        source: Tensor,
        into: Tensor,
        weight: Tensor | None = None,
        own: Tensor | None = None,
    ) -> Reduction:
        """Keep `index` [B, K] and let the tokens `source` [B, R] flow into the slots `into` [B, R].

        Without weights the flow is a sum: weight = own = 1, and every token flows somewhere.
        """
        return cls(index=index, length=length, source=source, into=into, weight=weight, own=own)

    @classmethod
    def average(
        cls, index: Tensor, length: int, source: Tensor, into: Tensor, size: Tensor | None = None
    ) -> Reduction:
        """Merge by the mean weighted with `size` [B, N], how many original tokens each stands for (None: 1).

        Tokens that flow to slot -1 are dropped and count nowhere.
        """
        if size is None:
            size = torch.ones(index.shape[0], length, device=index.device)
        own, flow, slot = size.gather(1, index), size.gather(1, source) * (into >= 0), into.clamp_min(0)
        total = own.scatter_add(1, slot, flow)
        return cls.merge(index, length, source, into, weight=flow / total.gather(1, slot), own=own / total)

    @classmethod
    def spread(
        cls, index: Tensor, length: int, source: Tensor, weight: Tensor, size: Tensor | None = None
    ) -> Reduction:
        """Keep `index` [B, K] and add `weight` [B, K, R] times the tokens `source` [B, R] to them.

        The sizes `size` [B, N] (None: 1) follow the same map, fractions of a token included.
        """
        if size is None:
            size = torch.ones(index.shape[0], length, device=index.device)
        gained = (weight.to(size.dtype) @ size.gather(1, source).unsqueeze(-1)).squeeze(-1)
        return cls(index, length, source=source, dense=weight, resized=size.gather(1, index) + gained)

    @classmethod
    def mix(cls, matrix: Tensor, index: Tensor | None = None) -> Reduction:
        """The general case, `matrix` [B, K, N]; a slot's token defaults to the one with the largest weight."""
        return cls(
            index=matrix.argmax(dim=-1) if index is None else index, length=matrix.shape[-1], dense=matrix
        )

    @property
    def count(self) -> int:
        """K, how many slots come out (padding included)."""
        return self.index.shape[1]

    @property
    def drops_only(self) -> bool:
        """Whether this is a pure gather."""
        return self.source is None and self.dense is None

    def apply(self, x: Tensor) -> Tensor:
        """Reduce `x` [B, N, D] -> [B, K, D], in the dtype of `x`."""
        if self.made is not None:
            return self.made.to(x.dtype)
        if self.dense is not None and self.source is None:
            return self.dense.to(x.dtype) @ x
        out = gather_tokens(x, self.index)
        if self.source is None:
            return out
        flow = gather_tokens(x, self.source)
        if self.dense is not None:
            return torch.baddbmm(out, self.dense.to(x.dtype), flow)
        if self.weight is not None:
            flow = _times(flow, self.weight)
        if self.own is not None:
            out = _times(out, self.own)
        return out.scatter_add_(1, self.into.clamp_min(0).unsqueeze(-1).expand_as(flow), flow)

    def gather(self, x: Tensor) -> Tensor:
        """What belongs to each slot's own token: `x` [B, N, ...] -> [B, K, ...] (positions, masks, RoPE)."""
        return gather_tokens(x, self.index)

    def size(self, size: Tensor | None) -> Tensor | None:
        """How many original tokens each slot stands for afterwards [B, K]; dropped tokens are lost.

        A token that flows counts whole, whatever its weight. None means all ones, and stays None where
        nothing merges.
        """
        if self.resized is not None:
            return self.resized
        if self.drops_only:
            return None if size is None else size.gather(1, self.index)
        if size is None:
            size = torch.ones(self.index.shape[0], self.length, device=self.index.device)
        if self.dense is not None:
            slots = torch.zeros(self.index.shape, device=size.device, dtype=size.dtype)
            owner = self.owner()
            return slots.scatter_add(1, owner.clamp_min(0), size * (owner >= 0))
        flow = size.gather(1, self.source) * (self.into >= 0)
        return size.gather(1, self.index).scatter_add(1, self.into.clamp_min(0), flow)

    def owner(self) -> Tensor:
        """The slot every input token went to, for the most part, int64 [B, N]; -1 where it was dropped.

        A token that has a slot of its own is there, even if it is a source too.
        """
        into = self.into
        if self.dense is not None:
            weight, slot = self.dense.abs().max(dim=1)
            into = torch.where(weight > 0, slot, -1)
            if self.source is None:
                return into
        slots = torch.arange(self.count, device=self.index.device).expand_as(self.index)
        owner = torch.full((self.index.shape[0], self.length), -1, device=self.index.device)
        if self.source is not None:
            owner = owner.scatter(1, self.source, into)
        if self.valid is not None:
            # Padding slots repeat some token's index; the real slot must win.
            extra = torch.full_like(owner[:, :1], -1)
            padded = torch.where(self.valid, self.index, self.length)
            return torch.cat([owner, extra], 1).scatter(1, padded, slots)[:, : self.length]
        return owner.scatter(1, self.index, slots)

    def heirs(self, place: Tensor) -> Tensor:
        """The place of the token that stands for every input token afterwards, int64 [B, N]; -1 where it was dropped.

        `place` [B, N] is any name for the input tokens, such as their place in the original sequence.
        """
        owner = self.owner()
        return torch.where(owner < 0, -1, self.gather(place).gather(1, owner.clamp_min(0)))

    def matrix(self) -> Tensor:
        """The map itself, float32 [B, K, N]; for tests and pictures, not for the hot path."""
        if self.dense is not None and self.source is None:
            return self.dense
        eye = torch.eye(self.length, device=self.index.device)
        return self.apply(eye.expand(self.index.shape[0], -1, -1))

    def compose(self, after: Reduction) -> Reduction:
        """This reduction followed by `after`, as one."""
        if self.drops_only and after.drops_only:
            return Reduction.keep(self.index.gather(1, after.index), self.length, after.valid)
        both = Reduction.mix(after.matrix() @ self.matrix(), self.index.gather(1, after.index))
        return replace(both, resized=after.resized if self.resized is None else after.size(self.resized))

    def reordered(self, given: Tensor, wanted: Tensor) -> Reduction:
        """The same map for a sequence in another order.

        Args:
            given: int64 [N], the place in that sequence of every token that goes into this map.
            wanted: int64 [K], which of this map's slots stands at every place of the result.
        """

        def slots(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, wanted]

        def places(x: Tensor | None) -> Tensor | None:
            return None if x is None else given[x]

        into, dense = self.into, slots(self.dense)
        if into is not None:
            into = torch.where(into < 0, -1, wanted.argsort()[into.clamp_min(0)])
        if dense is not None and self.source is None:
            dense = dense[:, :, given.argsort()]
        return replace(
            self,
            index=slots(places(self.index)),
            source=places(self.source),
            into=into,
            dense=dense,
            own=slots(self.own),
            valid=slots(self.valid),
            resized=slots(self.resized),
            made=slots(self.made),
        )

    def restore(self, y: Tensor, fill: Tensor | None = None) -> Tensor:
        """Full length again: every token gets its slot's value, `y` [B, K, D] -> [B, N, D].

        Dropped tokens get theirs from `fill` [B, N, D] (their last known value), or zeros.
        """
        return restore(y, self.owner(), fill)


def restore(y: Tensor, owner: Tensor, fill: Tensor | None = None) -> Tensor:
    """Full length again: `y` [B, K, D] at the places `owner` [B, N] says, [B, N, D]; `fill`, or 0, where it is -1."""
    full = gather_tokens(y, owner.clamp_min(0))
    return torch.where((owner < 0).unsqueeze(-1), torch.zeros_like(full) if fill is None else fill, full)


def follow(stands: Tensor, place: Tensor, heirs: Tensor, valid: Tensor | None = None) -> Tensor:
    """Where the original tokens are after one more reduction.

    Args:
        stands: int64 [B, M], per original token the place of the one that stands for it so far; -1 where it is gone.
        place: int64 [B, N], the original places of the tokens that go into the reduction.
        heirs: int64 [B, N], what `Reduction.heirs(place)` says of them.
        valid: bool [B, N], False for fillers, whose place is none (None: all real).

    Returns:
        int64 [B, M]; tokens of one group have the same value.
    """
    batch, length = stands.shape
    place = place if valid is None else torch.where(valid, place, length)
    step = stands.new_full((batch, length + 1), -1).scatter(1, place, heirs)
    return torch.where(stands < 0, -1, step.gather(1, stands.clamp_min(0)))


def follow_all(reductions: Sequence[Reduction]) -> list[Tensor]:
    """`follow` through reductions that come one after the other: after each of them, int64 [B, N]."""
    if not reductions:
        return []
    first = reductions[0]
    place = torch.arange(first.length, device=first.index.device).expand(first.index.shape[0], -1)
    stands, valid, found = place, None, []
    for reduction in reductions:
        stands = follow(stands, place, reduction.heirs(place), valid)
        found.append(stands)
        place, valid = reduction.gather(place), reduction.valid
    return found
