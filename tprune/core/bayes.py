"""Looking for the smallest value of a function that takes long: a Gaussian process says where to look next."""

from __future__ import annotations

import warnings

import numpy
from scipy.stats import norm, qmc
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern, WhiteKernel

CANDIDATES = 2048
"""Points of which the most promising one is taken; half of them near the best so far."""
NEAR = 0.05
"""How far these lie from it, a deviation, of the width of the cube."""


def spread(count: int, width: int, seed: int) -> numpy.ndarray:
    """`count` points of the unit cube, evenly spread at random (a scrambled Sobol sequence): float64 [count, width]."""
    with warnings.catch_warnings():
        # Its balance takes powers of two; it need not be perfect.
        warnings.simplefilter("ignore", UserWarning)
        return qmc.Sobol(width, seed=seed).random(count)


def expected_improvement(mean: numpy.ndarray, deviation: numpy.ndarray, best: float) -> numpy.ndarray:
    """By how much a normal variable is expected to be below `best`, where it is: [n] (Jones et al. 1998, eq. 15)."""
    deviation = numpy.maximum(deviation, 1e-12)
    ahead = best - mean
    return ahead * norm.cdf(ahead / deviation) + deviation * norm.pdf(ahead / deviation)


def propose(points: numpy.ndarray, values: numpy.ndarray, seed: int) -> numpy.ndarray:
    """Where the smallest value may best be looked for next: float64 [width].

    Args:
        points: [n, width] of the unit cube, where the function is known.
        values: [n], what it is there, with noise.
        seed: of this step.
    """
    width, draw = points.shape[1], numpy.random.default_rng(seed)
    kernel = Matern(numpy.full(width, 0.3), (0.03, 10.0), nu=2.5) + WhiteKernel(1e-3, (1e-6, 1.0))
    process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=seed)
    with warnings.catch_warnings():
        # A bound that is reached: the function does not depend on a number, or is not noisy.
        warnings.simplefilter("ignore", ConvergenceWarning)
        process.fit(points, values)
    best = process.predict(points).min()
    near = points[values.argmin()] + NEAR * draw.standard_normal((CANDIDATES // 2, width))
    offered = numpy.concatenate([draw.random((CANDIDATES // 2, width)), near.clip(0, 1)])
    return offered[expected_improvement(*process.predict(offered, return_std=True), best).argmax()]
