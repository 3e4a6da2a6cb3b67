"""Low frequencies of what comes token by token, and what they make of it."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

TABLE = 1 << 20
"""Up to so many numbers (4 MB) waves are held as a table for all layers: a product is faster than transforms."""


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


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # it outlives the mode that it is first made in
def _table(frequencies: int, period: int, device: torch.device) -> Tensor:
    """All waves, float32 [2 F, period]."""
    return waves(0, period, frequencies, period, device).T.contiguous()


def waves_of_few(first: int, last: int, frequencies: int, period: int, device: torch.device) -> Tensor:
    """As `waves`, the other way round, float32 [2 F, t]; read from the table where there is one."""
    begin = first % period
    if 2 * frequencies * period <= TABLE and begin + last - first <= period:
        return _table(frequencies, period, device)[:, begin : begin + last - first]
    return waves(first, last, frequencies, period, device).T


def made_of(coefficient: Tensor, length: int, period: int) -> Tensor:
    """Σ_n a[n] cos(2π n t / period) + b[n] sin(2π n t / period), t < `length`: [B, k, 2 F] -> [B, k, length]."""
    frequencies = coefficient.shape[2] // 2
    if coefficient.shape[2] * period <= TABLE:
        made = coefficient @ _table(frequencies, period, coefficient.device)[:, :length]
    else:
        cosine, sine = (coefficient * (period / 2)).chunk(2, dim=2)
        bins = torch.complex(cosine, -sine)
        bins[..., 0] *= 2
        made = torch.fft.irfft(bins, n=period, dim=2)[..., :length]
    if length <= period:
        return made
    return made[..., torch.arange(length, device=made.device) % period]


def held_in(weight: Tensor, frequencies: int, period: int) -> Tensor:
    """Σ_t w[t] cos(2π n t / period) and the same of sin, n < `frequencies`: [B, k, M] -> float32 [B, k, 2 F].

    As `low_frequencies`, along the other axis and of any length.
    """
    if weight.shape[2] > period:
        weight = pad(weight, (0, -weight.shape[2] % period)).unflatten(2, (-1, period)).sum(2)
    if 2 * frequencies * period <= TABLE:
        return weight @ _table(frequencies, period, weight.device)[:, : weight.shape[2]].T
    return low_frequencies(weight.mT, frequencies, period).mT
