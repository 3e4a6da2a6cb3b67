"""How far a budget is spent while something is trained."""

from __future__ import annotations


def cubic_rise(done: float, start: float, stop: float) -> float:
    """0 up to `start`, 1 from `stop` on, and 1 - (1 - t)³ between, t the share of the way (Zhu and Gupta, 1710.01878).

    Args:
        done: the share of the training that is over, 0 to 1.
        start, stop: of the rise, as shares of the training; start < stop.
    """
    way = min(max((done - start) / (stop - start), 0.0), 1.0)
    return 1 - (1 - way) ** 3
