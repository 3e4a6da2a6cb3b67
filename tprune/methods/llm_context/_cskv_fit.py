"""How cskv's maps are fitted (section 2.2 of the paper): every layer by itself, to what its projections make."""

from __future__ import annotations

from itertools import islice

import torch
from torch import nn
from torch.nn import functional

from tprune.core.low_rank import LowRankMap
from tprune.methods.fit import Fit, Plan

NAMES = ("key", "value")


class Reconstruction(Fit):
    """‖W x - up · down · x‖² of keys and of values; the model goes on with its own."""

    answers = False
    sites = ()

    def __init__(self, method, shape, keep):
        super().__init__(shape)
        self.method, self.projections = method, shape.projections
        self.plan = Plan(method.epochs, method.batch, method.lr)
        for name in ("key_down", "key_up", "value_down", "value_up"):
            setattr(self, name, nn.ParameterDict())
        for layer, made in self.projections.items():
            weights = made.weights()
            ranks = method.ranks([len(weight) for weight in weights], keep)
            for name, weight, rank in zip(NAMES, weights, ranks, strict=True):
                halves = {"down": (rank, weight.shape[1]), "up": (len(weight), rank)}
                for end, shape in halves.items():
                    getattr(self, f"{name}_{end}")[str(layer)] = nn.Parameter(torch.zeros(shape))

    def maps(self, layer):
        """Of keys and of values."""
        ends = [[getattr(self, f"{name}_{end}") for end in ("down", "up")] for name in NAMES]
        return [LowRankMap(down[str(layer)], up[str(layer)]) for down, up in ends]

    @torch.no_grad()
    def begin(self, forwards):
        """The singular vectors of the projections, for inputs of the size that they have (ASVD)."""
        sizes = dict.fromkeys(self.projections, 1e-6)
        for memory in islice(forwards, -(-self.method.looks // self.plan.batch)):
            for layer, view in memory["layers"].items():
                sizes[layer] = sizes[layer] + view.inputs.float().abs().mean(1).sum(0)
        for layer, made in self.projections.items():
            scale = None if self.method.looks == 0 else sizes[layer] ** self.method.scale
            for one, weight in zip(self.maps(layer), made.weights(), strict=True):
                first = LowRankMap.of(weight, scale).first(one.rank)
                one.down.copy_(first.down)
                one.up.copy_(first.up)

    def at(self, site, view, memory):
        """What every layer was given."""
        memory.setdefault("layers", {})[site.layer] = view

    def losses(self, outputs, labels, memory, dense):
        """The mean squared errors, summed over layers."""
        found = {"keys": 0.0, "values": 0.0}
        for layer, view in memory["layers"].items():
            wanted = view.projections.project(view.inputs)
            for name, one, exact in zip(found, self.maps(layer), wanted, strict=True):
                made = one.decode(one.encode(view.inputs.float()))
                found[name] = found[name] + functional.mse_loss(made, exact.float())
        return found

    def state(self):
        """The maps, by name and layer."""
        return {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}
