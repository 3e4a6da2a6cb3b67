"""Statistics of a linear layer's inputs, gathered batch by batch in float32.

Every class takes inputs x [N, L, C] (N sequences of L tokens; [T, C] counts as one sequence) by `add` and gives
named tensors by `result`; nothing but sums is kept, so memory does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def _sequences(x: Tensor) -> Tensor:
    """`x` as float32 [N, L, C]."""
    x = x.float()
    return x.unsqueeze(0) if x.dim() == 2 else x


def _squares(x: Tensor) -> Tensor:
    """Σ_t x_t² of x float32 [T, C]: [C]; on a CPU by numpy, which squares and sums in one go."""
    if x.device.type == "cpu":
        rows = x.numpy()
        return torch.from_numpy(np.einsum("tc,tc->c", rows, rows))
    return x.new_ones(1, len(x)).mm(x.square()).squeeze(0)


def token_cosine(before: Tensor, after: Tensor) -> Tensor:
    """Cosine between tokens [..., D] before and after a block, float32 [...]; 0.5 where one of them is zero."""
    before, after = before.float(), after.float()
    cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
    return cosine.nan_to_num(nan=0.5)


def gaussian_entropy(outputs: Tensor) -> float:
    """Entropy in bits, but for a constant, of outputs [S, C] of S samples, as if channels were independent Gaussians.

    Σ_c log2 σ_c; a channel that never changes counts as σ = 1e-12 (λ-ViT, equation 5, as the authors compute it).
    """
    return outputs.double().std(dim=0).clamp_min(1e-12).log2().sum().item()


class Norm:
    """`norm` [C]: the L2 norm of every input over all tokens."""

    strip = 512
    """Tokens squared at once, so that the squares stay few."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, x: Tensor, goes_on: bool = False) -> None:
        """Take in x [N, L, C], of whatever sequences."""
        if self.total is None:
            self.total = torch.zeros(x.shape[-1], device=x.device)
        for part in x.flatten(0, -2).split(self.strip):
            self.total += _squares(part.float())

    def share(self) -> tuple[Tensor, ...]:
        """The sums so far, float64."""
        return (self.total.double(),)

    def join(self, sums: tuple[Tensor, ...]) -> None:
        """Start from sums like these."""
        self.total = sums[0].float()

    def result(self) -> dict[str, Tensor]:
        """{"norm": [C]}."""
        return {"norm": self.total.sqrt()}


class Absolute:
    """`absolute` [C]: the mean magnitude of every input over all tokens."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.tokens = 0

    def add(self, x: Tensor, goes_on: bool = False) -> None:
        """Take in x [N, L, C], of whatever sequences."""
        x = x.flatten(0, -2)
        total = x.abs().sum(0, dtype=torch.float32)
        self.total = total if self.total is None else self.total + total
        self.tokens += len(x)

    def share(self) -> tuple[Tensor, ...]:
        """The sums so far, float64, and the number of tokens."""
        return self.total.double(), torch.tensor(self.tokens, dtype=torch.float64)

    def join(self, sums: tuple[Tensor, ...]) -> None:
        """Start from sums like these."""
        self.total, self.tokens = sums[0].float(), int(sums[1])

    def result(self) -> dict[str, Tensor]:
        """{"absolute": [C]}."""
        return {"absolute": self.total / self.tokens}


class Gram:
    """`gram` [C, C]: (2 / sequences) · Σ x xᵀ, the Hessian of the layer's squared error."""

    strip = 256
    """Rows computed at once: what lies under the diagonal is mirrored, not computed."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.sequences = 0

    def add(self, x: Tensor, goes_on: bool = False) -> None:
        """Take in x [N, L, C]; `goes_on`: further tokens of the sequences before."""
        x = _sequences(x)
        self.sequences += 0 if goes_on else x.shape[0]
        x = x.flatten(0, 1)
        width = x.shape[1]
        if self.total is None:
            self.total = torch.zeros(width, width, device=x.device)
        for first in range(0, width, self.strip):
            rows = slice(first, first + self.strip)
            self.total[rows, first:].addmm_(x[:, rows].t(), x[:, first:])

    def share(self) -> tuple[Tensor, ...]:
        """The sums so far, float64, and the number of sequences."""
        return self.total.double(), torch.tensor(self.sequences, dtype=torch.float64)

    def join(self, sums: tuple[Tensor, ...]) -> None:
        """Start from sums like these."""
        self.total, self.sequences = sums[0].float(), int(sums[1])

    def result(self) -> dict[str, Tensor]:
        """{"gram": [C, C]}."""
        width = self.total.shape[0]
        for first in range(0, width, self.strip):
            rows = slice(first, min(first + self.strip, width))
            corner = self.total[rows, rows].triu()
            self.total[rows, rows] = corner + corner.triu(1).t()
            self.total[rows.stop :, rows] = self.total[rows, rows.stop :].t()
        return {"gram": self.total.mul_(2 / self.sequences)}


class Moments:
    """`mean`, `variance` and `fluctuation` [C] of every input.

    The variance is the sample variance over all tokens (Chan's update, sequence by sequence, so that the batch
    size does not matter). The fluctuation is what FLAP's code accumulates in its place: with μ the running mean
    after n sequences, F <- F (n-1)/n + Σ_t (x_t - μ)² / (n+1) for n counted from 0, and 0 at the first.
    """

    def __init__(self) -> None:
        self.sequences = 0
        self.tokens = 0
        self.mean: Tensor | float = 0.0
        self.running: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0
        self.fluctuation: Tensor | float = 0.0

    def add(self, x: Tensor, goes_on: bool = False) -> None:
        """Take in x [N, L, C], whole sequences.

        Raises:
            ValueError: the tokens go on sequences taken in before.
        """
        if goes_on:
            raise ValueError("moments are taken sequence by sequence: each has to come whole")
        x = _sequences(x)
        means = x.mean(1)
        squares = (x - means.unsqueeze(1)).square_().sum(1)
        for mean, square in zip(means, squares, strict=True):
            self._add(mean, square, x.shape[1])

    def _add(self, mean: Tensor, square: Tensor, length: int) -> None:
        """Take in one sequence: its mean and its sum of squared deviations from it, both [C]."""
        n, total = self.sequences, self.tokens + length
        self.running = self.running * (n / (n + 1)) + mean / (n + 1)
        if n == 0:
            self.fluctuation = torch.zeros_like(mean)
        else:
            around = square + length * (mean - self.running).square()
            self.fluctuation = self.fluctuation * ((n - 1) / n) + around / (n + 1)
        shift = mean - self.mean
        self.squares = self.squares + square + shift.square() * (self.tokens * length / total)
        self.mean = self.mean + shift * (length / total)
        self.sequences, self.tokens = n + 1, total

    def result(self) -> dict[str, Tensor]:
        """{"mean": [C], "variance": [C], "fluctuation": [C]}."""
        variance = self.squares / max(self.tokens - 1, 1)
        return {"mean": self.mean, "variance": variance, "fluctuation": self.fluctuation}


KINDS = {"norm": Norm, "absolute": Absolute, "gram": Gram, "moments": Moments}
SHARED = ("norm", "absolute", "gram")
"""Kinds that are sums over tokens, so that several processes may each gather a part."""
PER_CHANNEL = {"norm", "absolute"}
"""Those of them that are so small that every thread may have its own."""


class Inputs:
    """The statistics asked for of one input.

    Attributes:
        tokens: how many it saw.
        sequences: in how many sequences; tokens without any, as experts get them, count as one at each call.
        shared: what users compute from the result, for others with the same input.
    """

    def __init__(self, kinds: tuple[str, ...]):
        self.tokens = 0
        self.sequences = 0
        self.shared: dict[str, object] = {}
        self._result: dict[str, Tensor] | None = None
        self.parts = [KINDS[kind]() for kind in kinds if kind in KINDS]

    def add(self, x: Tensor, goes_on: bool = False) -> None:
        """Take in x [N, L, C] or [T, C]; nothing happens where T is 0.

        `goes_on`: these are further tokens of the sequences before, for kinds in `SHARED` only.
        """
        count = x.numel() // x.shape[-1]
        if count:
            self.tokens += count
            if not goes_on:
                self.sequences += 1 if x.dim() == 2 else x.shape[0]
            for part in self.parts:
                part.add(x, goes_on)

    def share(self) -> tuple[int, int, list[tuple[Tensor, ...]]]:
        """What it took in as sums, float64 on the CPU, for `join`; there are none where it took in nothing."""
        sums = [tuple(one.cpu() for one in part.share()) for part in self.parts] if self.tokens else []
        return self.tokens, self.sequences, sums

    def join(
        self, shares: Iterable[tuple[int, int, list[tuple[Tensor, ...]]]], device: torch.device | str = "cpu"
    ) -> None:
        """Be what took in everything that `shares` did, in place of its own; added up in their order, on `device`.

        For the kinds in `SHARED`; the others depend on the order of sequences.
        """
        self.tokens = self.sequences = 0
        total: list[tuple[Tensor, ...]] = []
        for tokens, sequences, sums in shares:
            self.tokens, self.sequences = self.tokens + tokens, self.sequences + sequences
            if total and sums:
                total = [tuple(map(torch.add, one, other)) for one, other in zip(total, sums, strict=True)]
            else:
                total = total or sums
        for part, sums in zip(self.parts, total, strict=False):
            part.join(tuple(one.to(device) for one in sums))

    def result(self) -> dict[str, Tensor]:
        """All of them, by name; computed at the first call, when everything is taken in, and the sums are let go."""
        if self._result is None:
            self._result = {name: value for part in self.parts for name, value in part.result().items()}
            self.parts = []
        return self._result


def white(kinds: tuple[str, ...], width: int, device: torch.device | str) -> dict[str, Tensor]:
    """The statistics of inputs nothing is known of: unit norms, an identity Gram matrix, no mean.

    With them Wanda's score is the magnitude and SparseGPT neither prefers nor updates any column.
    """
    known = {
        "norm": {"norm": torch.ones(width, device=device)},
        "absolute": {"absolute": torch.ones(width, device=device)},
        "gram": {"gram": torch.eye(width, device=device)},
        "moments": {
            "mean": torch.zeros(width, device=device),
            "variance": torch.ones(width, device=device),
            "fluctuation": torch.ones(width, device=device),
        },
    }
    return {name: value for kind in kinds for name, value in known.get(kind, {}).items()}
