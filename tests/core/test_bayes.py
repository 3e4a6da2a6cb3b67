"""Looking for the smallest value of a function that takes long."""

import numpy
from scipy.stats import norm

from tprune.core.bayes import expected_improvement, propose, spread


def test_the_expected_improvement_is_the_mean_of_what_is_below_the_best():
    mean, deviation = numpy.array([0.0, 1.0, -0.5]), numpy.array([1.0, 0.3, 0.0])
    drawn = mean + deviation * norm.ppf((numpy.arange(200_000) + 0.5)[:, None] / 200_000)
    plain = numpy.maximum(0.2 - drawn, 0).mean(0)
    assert numpy.allclose(expected_improvement(mean, deviation, 0.2), plain, atol=1e-5)


def test_few_proposals_find_a_valley_that_even_points_miss():
    def valley(point):
        # The second number does not matter.
        return 3 * (point[..., 0] - 0.72) ** 2 + (point[..., 2] - 0.31) ** 2

    points = spread(8, 3, 0)
    assert points.shape == (8, 3)
    for step in range(10):
        points = numpy.concatenate([points, propose(points, valley(points), step)[None]])
    assert ((points >= 0) & (points <= 1)).all()
    assert valley(points).min() < 0.002 < valley(spread(18, 3, 0)).min()


def test_the_same_seed_proposes_the_same():
    points = spread(6, 2, 3)
    assert numpy.array_equal(points, spread(6, 2, 3))
    values = points.sum(1)
    assert numpy.array_equal(propose(points, values, 1), propose(points, values, 1))
    assert not numpy.array_equal(propose(points, values, 1), propose(points, values, 2))
