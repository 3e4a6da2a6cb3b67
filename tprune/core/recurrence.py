"""What a state-space layer's last output owes to each of its tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Recurrence(NamedTuple):
    """What Mamba's recurrence runs on: h[t] = exp(Δ[t] A) h[t-1] + Δ[t] B[t] x[t], y[t] = C[t] h[t].

    Attributes:
        x: [B, E, L], what enters each channel.
        step: Δ [B, E, L], positive.
        rate: A [E, S], negative.
        into, out: B and C, [B, S, L].
    """

    x: Tensor
    step: Tensor
    rate: Tensor
    into: Tensor
    out: Tensor


def shares_of_last(given: Recurrence) -> Tensor:
    """What the last output has of every token: C[L] exp(A (Δ[t+1] + … + Δ[L])) Δ[t] B[t] x[t], without a scan.

    Returns:
        float32 [B, E, L]; the sum over L is the last output.
    """
    x, step, rate, into, out = (part.float() for part in given)
    later = functional.pad(step[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
    read, reached = into * out[..., -1:], torch.zeros_like(x)
    for state in range(rate.shape[1]):  # one by one: [B, E, L, S] is several times the model
        reached += (later * rate[:, state, None]).exp() * read[:, state, None]
    return step * x * reached
