"""Channels of cached vectors as low frequencies along the tokens, in place of a number per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tprune.core.stored import TILE, Part, Tile


def low_frequencies(x: Tensor, frequencies: int, period: int) -> Tensor:
    """Σ_t x[t] cos(2π n t / period) and the same of sin, n < `frequencies`: [B, M, C] -> float32 [B, 2 F, C].

    These are the first bins of the Fourier transform of `x` filled up with zeros to `period`, M or more and 2 F or
    more.
    """
    bins = torch.fft.rfft(x.float(), n=period, dim=1)[:, :frequencies]
    return torch.cat([bins.real, -bins.imag], dim=1)


def waves(first: int, last: int, frequencies: int, period: int, device: torch.device) -> Tensor:
    """cos and sin of 2π n t / period at the tokens `first` to `last` - 1: float32 [t, 2 F]."""
    place, number = (torch.arange(a, b, device=device) for a, b in ((first, last), (0, frequencies)))
    angle = (place.unsqueeze(1) * number % period).float() * (2 * math.pi / period)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


@dataclass(frozen=True, eq=False)
class Signal:
    """Channels that low frequencies stand for.

    Attributes:
        coefficient: float32 [B, 2 F, n], of cosines and sines.
        level: float32 [B, 3, n]: the mean of the channel, the mean of what the frequencies make of it, and by how much
            the largest deviation from the one exceeds that from the other; of the tokens there were at first.
        period: of the lowest frequency but zero.
    """

    coefficient: Tensor
    level: Tensor
    period: int

    @classmethod
    def of(cls, x: Tensor, frequencies: int, period: int) -> Signal:
        """Of channels [B, M, n]."""
        raw = cls(low_frequencies(x, frequencies, period), x.new_zeros(len(x), 3, x.shape[2]), period)
        made, x = raw._waved(0, x.shape[1]), x.float()
        mean, center = x.mean(1), made.mean(1)
        spread, found = ((a - b.unsqueeze(1)).abs().amax(1) for a, b in ((x, mean), (made, center)))
        ratio = torch.where(found > 0, spread / found, 0)
        return replace(raw, level=torch.stack([mean, center, ratio], dim=1))

    @property
    def frequencies(self) -> int:
        """F."""
        return self.coefficient.shape[1] // 2

    def _waved(self, first: int, last: int) -> Tensor:
        rows = waves(first, last, self.frequencies, self.period, self.coefficient.device)
        return rows @ self.coefficient / self.frequencies

    def made(self, first: int, last: int) -> Tensor:
        """What stands at the tokens `first` to `last` - 1, stretched and moved to where the channels were."""
        mean, center, ratio = self.level.unsqueeze(1).unbind(2)
        return (self._waved(first, last) - center) * ratio + mean

    def add(self, x: Tensor, first: int) -> Signal:
        """With the channels [B, t, n] of further tokens, from the place `first` on."""
        rows = waves(first, first + x.shape[1], self.frequencies, self.period, x.device)
        return replace(self, coefficient=self.coefficient + rows.T @ x.float())

    @property
    def nbytes(self) -> int:
        """Coefficients and levels."""
        return self.coefficient.nbytes + self.level.nbytes

    def each_row(self, change: Callable[[Tensor], Tensor]) -> Signal:
        """Of all tensors."""
        return Signal(change(self.coefficient), change(self.level), self.period)


def errors(x: Tensor, frequencies: int, period: int) -> Tensor:
    """Mean squared error of low frequencies that stand for each channel of [B, M, C]: float32 [B, C]."""
    return (Signal.of(x, frequencies, period).made(0, x.shape[1]) - x.float()).square().mean(1)


@dataclass(frozen=True, eq=False)
class Mixed:
    """Vectors of which some channels are low frequencies and the others exact.

    Attributes:
        order: int16 [B, C], the channels; those that the frequencies stand for first.
        signal: of n channels.
        exact: [B, M, C - n].
    """

    order: Tensor
    signal: Signal
    exact: Tensor

    @classmethod
    def of(cls, x: Tensor, count: int, frequencies: int, period: int) -> Mixed:
        """Low frequencies for the `count` channels of [B, M, C] that they stand for best."""
        order = errors(x, frequencies, period).argsort(dim=1, stable=True)
        x = _channels(x, order)
        signal = Signal.of(x[..., :count], frequencies, period)
        return cls(order.short(), signal, x[..., count:].clone())

    @property
    def length(self) -> int:
        """M."""
        return self.exact.shape[1]

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.order.nbytes + self.signal.nbytes + self.exact.nbytes

    def dense(self, first: int, last: int) -> Tensor:
        """The vectors `first` to `last` - 1, [B, t, C]."""
        made = self.signal.made(first, last).to(self.exact.dtype)
        return _channels(torch.cat([made, self.exact[:, first:last]], dim=2), self.order.long().argsort(1))

    def append(self, x: Tensor) -> Mixed:
        """With further vectors [B, t, C]."""
        x = _channels(x, self.order.long())
        count = x.shape[2] - self.exact.shape[2]
        signal = self.signal.add(x[..., :count], self.length)
        return replace(self, signal=signal, exact=torch.cat([self.exact, x[..., count:]], dim=1))

    def each_row(self, change: Callable[[Tensor], Tensor]) -> Mixed:
        """Of all tensors."""
        return Mixed(change(self.order), self.signal.each_row(change), change(self.exact))


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
        yield self.key, self.value, None

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
            yield key, value, None

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
