"""The loss of a pruned model after training, as a law of its size, its pruning rate and the tokens of training.

P² law (Chen et al., ACL 2025, arXiv 2411.10272), with sizes in billions of parameters and tokens in billions:

    L(N, D, ρ) = L₀ + ρ^(-γ) · N^(-δ) · (N_C · N^(-α) + D_C · D^(-β) + E)

where N is the model's size before pruning, L₀ its loss then, ρ the fraction removed and D the tokens of training.
Arrays are float64; the first axis of points has one entry for each measured loss.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Points:
    """Where losses were measured, [P] each.

    Attributes:
        size: N, billions of parameters before pruning.
        tokens: D, billions of tokens of training after it.
        rate: ρ, the fraction removed.
        dense: L₀, the loss before pruning on the same data.
    """

    size: Array
    tokens: Array
    rate: Array
    dense: Array


@dataclass(frozen=True)
class Law:
    """The law's parameters; N_C, D_C, E, α and β are positive, and γ is negative where more pruning costs more."""

    n_c: float
    d_c: float
    e: float
    alpha: float
    beta: float
    gamma: float
    delta: float

    def loss(self, at: Points) -> Array:
        """The loss at some points, [P]."""
        return at.dense + self._factor(at) * (self._floor(at) + self.d_c * at.tokens**-self.beta)

    def best(self, at: Points) -> Array:
        """What the loss approaches with ever more tokens, [P]."""
        return at.dense + self._factor(at) * self._floor(at)

    def tokens_for(self, loss: float, at: Points) -> Array:
        """How many billions of tokens lead to a loss, [P]; infinite where none do. The tokens of `at` do not matter."""
        rest = (loss - at.dense) / self._factor(at) - self._floor(at)
        with np.errstate(divide="ignore"):
            return (self.d_c / np.maximum(rest, 0.0)) ** (1 / self.beta)

    def tokens_until_doubling_gains(self, gain: float, at: Points) -> Array:
        """The billions of tokens from which on twice as many lower the loss by less than `gain`, [P]."""
        saved = self._factor(at) * self.d_c * (1 - 2.0**-self.beta)
        return (saved / gain) ** (1 / self.beta)

    def _factor(self, at: Points) -> Array:
        return at.rate**-self.gamma * at.size**-self.delta

    def _floor(self, at: Points) -> Array:
        return self.n_c * at.size**-self.alpha + self.e


POSITIVE = ("n_c", "d_c", "e", "alpha", "beta")
"""Parameters that are fitted by their logarithm."""


def free_parameters(at: Points) -> tuple[str, ...]:
    """What is fitted: of one size N_C, α and δ are part of E and D_C, of one rate γ is, too.

    Of two sizes N_C, α and E are several with the same losses at both, and others in between and beyond.
    """
    bound = () if len(np.unique(at.size)) > 1 else ("n_c", "alpha", "delta")
    bound += () if len(np.unique(at.rate)) > 1 else ("gamma",)
    return tuple(field.name for field in fields(Law) if field.name not in bound)


def fit(at: Points, loss: Array, starts: int = 16, seed: int = 0) -> Law:
    """The law that is nearest to the measured losses [P]: nonlinear least squares by Levenberg-Marquardt.

    The best of many starts is taken. Parameters that the points do not tell (`free_parameters`) are 0, α too.

    Raises:
        ValueError: fewer points than free parameters, or losses after fewer than three different numbers of tokens,
            from which D_C, β and E cannot be told.
    """
    free, lengths = free_parameters(at), len(np.unique(at.tokens))
    if len(loss) < len(free):
        raise ValueError(f"{len(loss)} points for {len(free)} parameters ({', '.join(free)})")
    if lengths < 3:
        raise ValueError(f"losses after {lengths} different numbers of tokens, where a curve needs 3")

    def law(values: Array) -> Law:
        found = dict(zip(free, values, strict=True))
        found |= {name: float(np.exp(found[name])) for name in POSITIVE if name in found}
        return Law(**{field.name: float(found.get(field.name, 0.0)) for field in fields(Law)})

    def residuals(values: Array) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.nan_to_num(
                law(np.clip(values, -50, 50)).loss(at) - loss, nan=1e6, posinf=1e6, neginf=-1e6
            )

    draws = np.random.default_rng(seed).normal(size=(starts, len(free)))
    around = np.array([-1.0 if name in POSITIVE else 0.0 for name in free])
    found = [least_squares(residuals, around + draw, method="lm", xtol=1e-12, ftol=1e-12) for draw in draws]
    best = min(found, key=lambda one: one.cost)
    return law(np.clip(best.x, -50, 50))


def quality(law: Law, at: Points, loss: Array) -> dict[str, float]:
    """How well a law tells measured losses [P].

    Returns:
        "r2", the share of their variance that it explains; "error", the mean absolute difference; "slope_error", the
        mean absolute difference of slopes between neighbouring points of a curve, loss per billion tokens (the
        paper's Average Slope Difference), where some curve has two.
    """
    told = law.loss(at)
    spread = float(np.square(loss - loss.mean()).sum())
    found = {"r2": 1 - float(np.square(loss - told).sum()) / spread} if spread else {}
    found["error"] = float(np.abs(loss - told).mean())
    differences = [
        np.diff(told[curve] - loss[curve]) / np.diff(at.tokens[curve])
        for curve in curves(at)
        if len(curve) > 1
    ]
    if differences:
        found["slope_error"] = float(np.abs(np.concatenate(differences)).mean())
    return found


def curves(at: Points) -> list[NDArray[np.int64]]:
    """Which points are of one pruned model, ascending in tokens; several at the same tokens are of several curves."""
    found: dict[tuple[float, ...], list[int]] = {}
    for place in np.argsort(at.tokens, kind="stable"):
        key, number = (float(at.size[place]), float(at.rate[place]), float(at.dense[place])), 0
        while (held := found.get((*key, number))) and at.tokens[held[-1]] == at.tokens[place]:
            number += 1
        found.setdefault((*key, number), []).append(int(place))
    return [np.array(places) for _, places in sorted(found.items())]


def at_place(at: Points, place: int) -> Points:
    """One of the points by itself."""
    return Points(*(values[place : place + 1] for values in astuple(at)))
