"""Channels of cached vectors as low frequencies along the tokens, in place of a number per token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tprune.core.attending import capped
from tprune.core.stored import TILE, Part
from tprune.core.tiles import Seen, Tile, own_heads
from tprune.core.waves import held_in, low_frequencies, made_of, waves, waves_of_few

ROUNDING = 1e-5
"""Of a number's size, what is lost of it in float32 sums."""


@dataclass(frozen=True, eq=False)
class Signal:
    """Channels that low frequencies stand for.

    Attributes:
        coefficient: float32 [B, 2 F, n], of cosines and sines; what they make is moved and stretched to where the
            channels were: their mean, and unless a plain series is asked for their largest deviation from it, are those
            of the tokens there were at first.
        ratio: float32 [B, 1, n], by how much what the bare frequencies make is stretched.
        period: of the lowest frequency but zero.
    """

    coefficient: Tensor
    ratio: Tensor
    period: int

    @classmethod
    def of(cls, x: Tensor, frequencies: int, period: int, stretched: bool = True) -> Signal:
        """Of channels [B, M, n]; not `stretched`, but the first terms of a Fourier series around their means."""
        count, x = x.shape[1], x.float()
        coefficient = low_frequencies(x, frequencies, period) / frequencies
        made = waves(0, count, frequencies, period, x.device) @ coefficient
        mean, center = x.mean(1), made.mean(1)
        spread, found = ((a - b.unsqueeze(1)).abs().amax(1) for a, b in ((x, mean), (made, center)))
        # A constant deviates from itself by rounding alone.
        wanted = spread / found if stretched else 2 * frequencies / period
        ratio = torch.where(found > ROUNDING * center.abs(), wanted, 0).unsqueeze(1)
        coefficient[:, 0] -= center
        coefficient *= ratio
        coefficient[:, 0] += mean
        return cls(coefficient, ratio, period)

    @property
    def frequencies(self) -> int:
        """F."""
        return self.coefficient.shape[1] // 2

    def made(self, first: int, last: int) -> Tensor:
        """What stands at the tokens `first` to `last` - 1: [B, t, n]."""
        return waves(first, last, self.frequencies, self.period, self.ratio.device) @ self.coefficient

    def times(self, weight: Tensor, length: int) -> Tensor:
        """What stands at the first `length` tokens, times `weight` [B, n, k]: [B, k, length]; it is never made."""
        return made_of(weight.mT @ self.coefficient.mT, length, self.period)

    def summed(self, weight: Tensor) -> Tensor:
        """What stands at the first M tokens, summed by `weight` [B, k, M]: [B, k, n]; it is never made."""
        return held_in(weight, self.frequencies, self.period) @ self.coefficient

    def add(self, x: Tensor, first: int) -> Signal:
        """With the channels [B, t, n] of further tokens, from the place `first` on."""
        place = waves_of_few(first, first + x.shape[1], self.frequencies, self.period, x.device)
        place, x = place.expand(len(x), -1, -1), x.float() * self.ratio
        coefficient = torch.baddbmm(self.coefficient, place, x, alpha=1 / self.frequencies)
        return replace(self, coefficient=coefficient)

    @property
    def nbytes(self) -> int:
        """Coefficients and ratios."""
        return self.coefficient.nbytes + self.ratio.nbytes

    def each_row(self, change: Callable[[Tensor], Tensor]) -> Signal:
        """Of all tensors."""
        return Signal(change(self.coefficient), change(self.ratio), self.period)


def errors(x: Tensor, frequencies: int, period: int, stretched: bool = True) -> Tensor:
    """Mean squared error of low frequencies that stand for each channel of [B, M, C]: float32 [B, C]."""
    return (Signal.of(x, frequencies, period, stretched).made(0, x.shape[1]) - x.float()).square().mean(1)


@dataclass(frozen=True, eq=False)
class Mixed:
    """Vectors of which some channels are low frequencies and the others exact.

    Attributes:
        order: int64 [B, C], the channels; those that the frequencies stand for first.
        signal: of n channels.
        exact: [B, M - m, C - n].
        latest: [B, m, C - n], of entries that came one by one; copying all of `exact` for each would take time.
    """

    order: Tensor
    signal: Signal
    exact: Tensor
    latest: Tensor

    @classmethod
    def of(cls, x: Tensor, count: int, frequencies: int, period: int, stretched: bool = True) -> Mixed:
        """Low frequencies for the `count` channels of [B, M, C] that they stand for best; `Signal.of` has the rest."""
        order = errors(x, frequencies, period, stretched).argsort(dim=1, stable=True)
        x = _channels(x, order)
        signal = Signal.of(x[..., :count], frequencies, period, stretched)
        exact = x[..., count:].clone()
        return cls(order, signal, exact, exact[:, :0])

    @property
    def length(self) -> int:
        """M."""
        return self.exact.shape[1] + self.latest.shape[1]

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.order.nbytes + self.signal.nbytes + self.exact.nbytes + self.latest.nbytes

    def dense(self, first: int, last: int) -> Tensor:
        """The vectors `first` to `last` - 1, [B, t, C]."""
        made = self.signal.made(first, last).to(self.exact.dtype)
        exact = torch.cat([self.exact, self.latest], dim=1)[:, first:last]
        return _channels(torch.cat([made, exact], dim=2), self.order.argsort(1))

    def times(self, weight: Tensor) -> Tensor:
        """The vectors times `weight` [B, C, k], float32: [B, k, M]."""
        weight = weight.gather(1, self.order.unsqueeze(2).expand_as(weight))
        waved, exact = weight.split([weight.shape[1] - self.exact.shape[2], self.exact.shape[2]], dim=1)
        parts = [exact.mT @ part.float().mT for part in (self.exact, self.latest)]
        return self.signal.times(waved, self.length) + torch.cat(parts, dim=2)

    def summed(self, weight: Tensor) -> Tensor:
        """The vectors, summed by `weight` [B, k, M], float32: [B, k, C]."""
        older, newer = weight.split([self.exact.shape[1], self.latest.shape[1]], dim=2)
        exact = older @ self.exact.float() + newer @ self.latest.float()
        found = torch.cat([self.signal.summed(weight), exact], dim=2)
        return torch.empty_like(found).scatter_(2, self.order.unsqueeze(1).expand_as(found), found)

    def append(self, x: Tensor) -> Mixed:
        """With further vectors [B, t, C]."""
        x = _channels(x, self.order)
        count = x.shape[2] - self.exact.shape[2]
        signal = self.signal.add(x[..., :count], self.length)
        exact, latest = self.exact, torch.cat([self.latest, x[..., count:]], dim=1)
        if latest.shape[1] >= TILE:
            exact = torch.cat([exact, latest], dim=1)
            latest = exact[:, :0]
        return Mixed(self.order, signal, exact, latest)

    def each_row(self, change: Callable[[Tensor], Tensor]) -> Mixed:
        """Of all tensors."""
        exact, latest = change(self.exact), change(self.latest)
        return Mixed(change(self.order), self.signal.each_row(change), exact, latest)


def _channels(x: Tensor, order: Tensor) -> Tensor:
    """Channels of [B, M, C] in the `order` [B, C]."""
    return x.gather(2, order.unsqueeze(1).expand_as(x))


def together(x: Tensor) -> Tensor:
    """All heads' channels side by side: [B, G, M, d] -> [B, M, G d]."""
    return x.transpose(1, 2).flatten(2)


@dataclass(frozen=True, eq=False)
class Exact(Part):
    """Entries as they are.

    Attributes:
        key, value: [B, G, t, d].
    """

    key: Tensor
    value: Tensor

    @property
    def nbytes(self) -> int:
        """Keys and values."""
        return self.key.nbytes + self.value.nbytes

    def tiles(self) -> Iterator[Tile]:
        """All at once."""
        yield Tile(self.key, self.value)

    def each_row(self, change: Callable[[Tensor], Tensor]) -> Exact:
        """Of both."""
        return Exact(change(self.key), change(self.value))


@dataclass(frozen=True, eq=False)
class Fourier(Part):
    """Entries of which some channels, of all heads together, are low frequencies.

    Attributes:
        key, value: their vectors.
        heads: G.
    """

    key: Mixed
    value: Mixed
    heads: int
    grows = True
    splits = False

    @property
    def length(self) -> int:
        """M."""
        return self.key.length

    @property
    def nbytes(self) -> int:
        """Keys and values."""
        return self.key.nbytes + self.value.nbytes

    def tiles(self) -> Iterator[Tile]:
        """What the frequencies make of them, a tile at a time."""
        for first in range(0, self.length, TILE):
            last = min(first + TILE, self.length)
            key, value = (
                part.dense(first, last).unflatten(2, (self.heads, -1)).transpose(1, 2)
                for part in (self.key, self.value)
            )
            yield Tile(key, value)

    def seen_by(self, query: Tensor) -> Iterator[Seen]:
        """All at once, as it is."""
        yield Series(self)

    def each_row(self, change: Callable[[Tensor], Tensor]) -> Fourier:
        """Of both."""
        return Fourier(self.key.each_row(change), self.value.each_row(change), self.heads)

    def like(self, key: Tensor, value: Tensor) -> Exact:
        """As they are: frequencies are of all tokens together."""
        return Exact(key, value)

    def join(self, later: Exact) -> Fourier:
        """The frequencies of both together."""
        return replace(
            self, key=self.key.append(together(later.key)), value=self.value.append(together(later.value))
        )


@dataclass(frozen=True, eq=False)
class Series:
    """Entries that are read without being made: a query is turned into frequencies, and so are its weights.

    Attributes:
        part: which.
    """

    part: Fourier

    @property
    def entries(self) -> int:
        """M."""
        return self.part.length

    def logits(self, asked: Tensor, softcap: float | None) -> Tensor:
        """As `Seen`."""
        batch, heads, rows, width = asked.shape
        groups = self.part.heads
        own = asked.reshape(batch, groups, -1, width).transpose(2, 3).unsqueeze(3)  # [B, G, d, 1, r·q]
        apart = torch.eye(groups, device=asked.device)[:, None, :, None]  # a group reads its own channels
        found = self.part.key.times((own * apart).flatten(3).flatten(1, 2))  # [B, H·q, M]
        return capped(found.view(batch, heads, rows, -1), softcap)

    def read(self, weight: Tensor) -> Tensor:
        """As `Seen`."""
        batch, heads, rows, length = weight.shape
        groups = self.part.heads
        found = self.part.value.summed(weight.reshape(batch, heads * rows, length))
        return own_heads(found.unflatten(2, (groups, -1)).transpose(1, 2), heads)
