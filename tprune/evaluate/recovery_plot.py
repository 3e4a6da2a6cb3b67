"""Measured losses of pruned models in training, and the curves of the law that was fitted to them."""

from __future__ import annotations

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from tprune.core.recovery_law import Array, Law, Points, at_place, curves
from tprune.evaluate.plots import STYLE, looks, png, svg
from tprune.evaluate.table import engineering


def draw(law: Law, at: Points, loss: Array, kind: str) -> bytes:
    """A "png" or "svg": loss against tokens, a colour for every pruned model, drawn on to ten times its tokens."""
    groups = curves(at)
    names = [
        f"{place}. {engineering(1e9 * at.size[group[0]])} without {at.rate[group[0]]:.1%}"
        for place, group in enumerate(groups, 1)
    ]
    with rc_context(STYLE):
        figure = Figure(figsize=(8.6, 4.8), layout="constrained")
        axes = figure.add_subplot()
        for group, (name, look) in zip(groups, looks(names).items(), strict=True):
            measured = at.tokens[group]
            axes.plot(1e9 * measured, loss[group], look.marker, color=look.colour, label=name)
            along = np.geomspace(measured[0], 10 * measured[-1], 200)
            one = at_place(at, int(group[0]))
            told = law.loss(Points(one.size, along, one.rate, one.dense))
            axes.plot(1e9 * along, told, color=look.colour, linewidth=1)
        axes.set_xscale("log")
        axes.set_xlabel("tokens of training after pruning")
        axes.set_ylabel("loss")
        figure.suptitle("P² law: measured losses, and its curves", fontsize=10, x=0.01, ha="left")
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        return {"png": png, "svg": svg}[kind](figure)
