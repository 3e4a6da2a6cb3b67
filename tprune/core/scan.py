"""State-space recurrences over a sequence, in far fewer steps than it has tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional


def selective_scan(
    x: Tensor, step: Tensor, rate: Tensor, into: Tensor, out: Tensor, idle: Tensor | None = None
) -> Tensor:
    """Mamba's recurrence: h[t] = exp(Δ[t] A) h[t-1] + Δ[t] B[t] x[t], y[t] = C[t] h[t].

    The tokens are cut into √L runs that are walked side by side: once from nothing, for what each run leaves behind,
    and again from what the runs before it left. That is 3 √L steps instead of L, on the states of √L tokens at a time;
    the states of all are never there at once, unless a gradient is asked for.

    Args:
        x: [B, E, L], what enters each channel.
        step: Δ [B, E, L], positive.
        rate: A [E, S], negative.
        into, out: B and C, [B, S, L].
        idle: [B, E, L], time that passes before each token and brings nothing: the state decays by exp(idle A) more.

    Returns:
        y, float32 [B, E, L]; the state is kept in float32.
    """
    length, rate, step = x.shape[-1], rate.float(), step.float()
    time = step if idle is None else step + idle.float()
    time, enters, into, out = (_runs(part) for part in (time, step * x.float(), into.float(), out.float()))

    def walk(state: Tensor) -> Iterator[Tensor]:
        """The states [B, R, E, S] of the first tokens of all runs, of the second ones, ..."""
        for passed, value, gate in zip(time, enters, into, strict=True):
            decay = (passed.unsqueeze(-1) * rate).exp()
            state = torch.addcmul(value.unsqueeze(-1) * gate.unsqueeze(-2), decay, state)
            yield state

    left = deque(walk(x.new_zeros((), dtype=torch.float32)), maxlen=1).pop()
    decays = (time.sum(0).unsqueeze(-1) * rate).exp()
    before = [torch.zeros_like(left[:, 0])]
    for decay, own in zip(decays.unbind(1)[:-1], left.unbind(1)[:-1], strict=True):
        before.append(torch.addcmul(own, decay, before[-1]))
    states = walk(torch.stack(before, 1))
    y = [(state @ gate.unsqueeze(-1)).squeeze(-1) for state, gate in zip(states, out, strict=True)]
    return torch.stack(y).permute(1, 3, 2, 0).flatten(2)[..., :length]


def _runs(part: Tensor) -> Tensor:
    """[B, E, L] in √L runs of equal length T, filled up with zeros: [T, B, R, E]."""
    length = part.shape[-1]
    runs = isqrt(length - 1) + 1
    size = -(-length // runs)
    filled = functional.pad(part, (0, runs * size - length))
    return filled.unflatten(-1, (runs, size)).permute(3, 0, 2, 1).contiguous()


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Every channel convolved over the tokens up to itself: x [B, E, L], weight [E, 1, K] -> [B, E, L]."""
    padded = functional.pad(x, (weight.shape[-1] - 1, 0))
    return functional.conv1d(padded, weight, bias, groups=x.shape[1])
