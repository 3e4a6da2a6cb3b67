"""Linear regression by gradient descent, its setting chosen by cross-validation, where there are few points."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FOLDS = 5


def kendall_tau(one: Tensor, other: Tensor) -> Tensor:
    """Kendall's τ-b between `one` [S, N] and `other` [N], for every row [S]; NaN where one of them is constant."""
    left = (one.unsqueeze(2) - one.unsqueeze(1)).sign()
    right = (other.unsqueeze(1) - other.unsqueeze(0)).sign()
    return (left * right).sum((1, 2)) / (left.square().sum((1, 2)) * right.square().sum()).sqrt()


@dataclass(frozen=True)
class Lasso:
    """y ≈ x β + b under an L1 penalty of β, from zero by Adam (the estimator of Bonsai's code).

    Every combination of learning rate, penalty and batch is fitted on 4/5 of the points, five times; the one with the
    highest mean τ on the other fifths is fitted to all. Within a fit the epoch with the highest τ counts, the learning
    rate is halved when τ stands still, and long enough without a better one the fit is over.

    Attributes:
        rates: the learning rate is 1 / (features that are ever on · rate).
        penalties: of Σ |β|, beside the mean squared error.
        batches: points per step; what is more than there are is all of them.
        epochs: at most.
        patience: epochs without a better τ after which a fit is over.
    """

    rates: tuple[float, ...] = (100.0, 10.0, 1.0, 0.1)
    penalties: tuple[float, ...] = (100.0, 1e-4, 0.0)
    batches: tuple[int, ...] = (32, 64, 128)
    epochs: int = 50
    patience: int = 10

    def fit(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """β [F] for features x [N, F] and targets y [N]; float64 on the CPU, zeros where no fit has an order.

        Args:
            generator: shuffles the points of every epoch.
        """
        x, y = x.double().cpu(), y.double().cpu()
        best, found = -torch.inf, None
        settings = [(rate, penalty) for rate in self.rates for penalty in self.penalties]
        for place, batch in enumerate(dict.fromkeys(min(batch, len(y)) for batch in self.batches)):
            taus = torch.stack(
                [self._fit(x, y, fold, settings, batch, generator)[0] for fold in _folds(len(y))]
            )
            for setting, tau in zip(settings, taus.mean(0).tolist(), strict=True):
                # Equal but for rounding: the first, where the rate is outside and the batch inside.
                rank = (round(tau, 9), -settings.index(setting), -place)
                if tau > -torch.inf and (found is None or rank > best):
                    best, found = rank, (setting, batch)
        if found is None:
            return x.new_zeros(x.shape[1])
        every = torch.arange(len(y))
        setting, batch = found
        return self._fit(x, y, (every, every), [setting], batch, generator)[1][0]

    def _fit(
        self,
        x: Tensor,
        y: Tensor,
        fold: tuple[Tensor, Tensor],
        settings: Sequence[tuple[float, float]],
        batch: int,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """The best τ of every setting [S] on the second part of `fold`, fitted on the first; and its β [S, F]."""
        train, test = fold
        inputs, targets = x[train], y[train] - y[train].mean()
        rates, penalties = (x.new_tensor(column).unsqueeze(1) for column in zip(*settings, strict=True))
        on = int((inputs.mean(0) != 0).sum())
        adam = _Adam(1 / (max(on, 1) * rates), x.shape[1] + 1)
        plateau = _Plateau(len(settings))
        best_tau = x.new_full((len(settings),), -torch.inf)
        best = adam.values.clone()
        since = torch.zeros(len(settings))
        for _ in range(self.epochs):
            order = torch.randperm(len(train), generator=generator)
            for part in order.split(batch):
                adam.step(_gradient(adam.values, inputs[part], targets[part], penalties))
            tau = kendall_tau(adam.values[:, :-1] @ x[test].T + adam.values[:, -1:], y[test])
            better = (since <= self.patience) & (tau >= best_tau)
            best_tau = torch.where(better, tau, best_tau)
            best = torch.where(better.unsqueeze(1), adam.values, best)
            since = torch.where(better, 0.0, since) + (since <= self.patience)
            adam.rate = plateau.halve(tau, adam.rate)
            if bool((since > self.patience).all()):
                break
        return best_tau, best[:, :-1]


def _gradient(values: Tensor, x: Tensor, y: Tensor, penalties: Tensor) -> Tensor:
    """Of the mean squared error and the penalty with respect to `values` [S, F + 1], the bias last."""
    error = values[:, :-1] @ x.T + values[:, -1:] - y
    slope = 2 / len(y) * (error @ x) + penalties * values[:, :-1].sign()
    return torch.cat([slope, 2 * error.mean(1, keepdim=True)], 1)


def _folds(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(what is learned from, what is looked at): each fifth of the points, in order, once."""
    size, every = count // FOLDS, torch.arange(count)
    for fold in range(FOLDS):
        test = (every >= fold * size) & (every < (fold + 1) * size)
        yield every[~test], every[test]


class _Adam:
    """Adam (β 0.9 and 0.999) of several fits at once, each with its own rate [S, 1]."""

    def __init__(self, rate: Tensor, size: int):
        self.rate, self.steps = rate, 0
        self.values, self.mean, self.square = (rate.new_zeros(len(rate), size) for _ in range(3))

    def step(self, gradient: Tensor) -> None:
        self.steps += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.lerp_(gradient.square(), 0.001)
        size = (self.square / (1 - 0.999**self.steps)).sqrt() + 1e-8
        self.values -= self.rate * self.mean / (1 - 0.9**self.steps) / size


class _Plateau:
    """Halves the rate of a fit after more than three epochs in which τ did not rise by 1e-4 of itself."""

    def __init__(self, count: int):
        self.best, self.bad = torch.full((count,), -torch.inf, dtype=torch.float64), torch.zeros(count)

    def halve(self, tau: Tensor, rate: Tensor) -> Tensor:
        risen = tau > self.best * 1.0001
        self.best = torch.where(risen, tau, self.best)
        self.bad = torch.where(risen, 0.0, self.bad + 1)
        tired = self.bad > 3
        self.bad = torch.where(tired, 0.0, self.bad)
        lower = (rate / 2).clamp_min(1e-5)
        return torch.where(tired.unsqueeze(1) & (rate - lower > 1e-8), lower, rate)
