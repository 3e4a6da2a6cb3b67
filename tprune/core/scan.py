"""State-space recurrences over a sequence, without a loop over its tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def linear_scan(decay: Tensor, value: Tensor) -> Tensor:
    """All states of h[t] = decay[t] · h[t-1] + value[t] with h before the first = 0.

    Pairs of steps are one step of a sequence half as long: log₂ L rounds, about three products per entry in all. No
    quotients of decays are formed, so nothing overflows.

    Args:
        decay, value: [..., L, S].

    Returns:
        [..., L, S].
    """
    length = value.shape[-2]
    if length == 1:
        return value
    even = length - length % 2
    first_decay, second_decay = decay[..., 0:even:2, :], decay[..., 1::2, :]
    first, second = value[..., 0:even:2, :], value[..., 1::2, :]
    after_second = linear_scan(second_decay * first_decay, second_decay * first + second)
    later = decay[..., 2::2, :] * after_second[..., : (length - 1) // 2, :] + value[..., 2::2, :]
    after_first = torch.cat([value[..., :1, :], later], -2)
    states = torch.stack([after_first[..., : even // 2, :], after_second], -2).flatten(-3, -2)
    return states if even == length else torch.cat([states, after_first[..., -1:, :]], -2)


def selective_scan(
    x: Tensor, step: Tensor, rate: Tensor, into: Tensor, out: Tensor, idle: Tensor | None = None
) -> Tensor:
    """Mamba's recurrence: h[t] = exp(Δ[t] A) h[t-1] + Δ[t] B[t] x[t], y[t] = C[t] h[t].

    Args:
        x: [B, E, L], what enters each channel.
        step: Δ [B, E, L], positive.
        rate: A [E, S], negative.
        into, out: B and C, [B, S, L].
        idle: [B, E, L], time that passes before each token and brings nothing: the state decays by exp(idle A) more.

    Returns:
        y, float32 [B, E, L]; the state is kept in float32.
    """
    x, step, rate = x.float(), step.float(), rate.float()
    time = step if idle is None else step + idle.float()
    decay = (time.unsqueeze(-1) * rate.unsqueeze(1)).exp()
    value = (step * x).unsqueeze(-1) * into.float().transpose(1, 2).unsqueeze(1)
    return torch.einsum("bels,bsl->bel", linear_scan(decay, value), out.float())


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Every channel convolved over the tokens up to itself: x [B, E, L], weight [E, 1, K] -> [B, E, L]."""
    padded = functional.pad(x, (weight.shape[-1] - 1, 0))
    return functional.conv1d(padded, weight, bias, groups=x.shape[1])
