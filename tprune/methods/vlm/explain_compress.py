"""Tokens that explain the answer stay; a small convolutional network tells them from the first layer's attention.

Handed back through the attention of all layers, an answer says which image tokens it came from. That takes a whole pass
and its gradients; the network learns to foretell it from what the words pay to the image in the first layer, so that
tokens leave before any layer has run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from tprune.core import select
from tprune.core.budget import Site, Stage
from tprune.core.explain import attention_relevance, foretelling_loss
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.fit import Fit, Plan
from tprune.methods.tokens import TokenMethod

KERNEL = 3


@dataclass(frozen=True)
class ExplainCompress(TokenMethod):
    """Before the first layer the round(r · V) image tokens stay that the network calls most relevant."""

    kind = "trained"
    learns = "required"
    paper = Paper(
        title="Generic Token Compression in Multimodal Large Language Models from an Explainability Perspective",
        venue="arXiv",
        year=2025,
        arxiv="2506.01097",
        checked="abstract",
        notes="A reconstruction: no code is public. The explanation is that of Chefer et al. (arXiv 2103.15679) of the "
        "answers' log-probability; the network's size, its input (the words' mean attention in every head, relative to "
        "its mean over the image) and the loss it learns by are ours. Tokens without rows and columns "
        "(newlines, resized mosaics) leave first, positions stay (ours).",
    )
    reads = ()
    native = ("ratio",)
    built_in = {"epochs": 2.0, "batch": 16, "lr": 1e-3}

    ratio: float = param(0.5, "fraction of the image tokens that stays", low=0, high=1)
    channels: int = param(32, "of the network", low=1)
    layers: int = param(3, "of the network, the last one included", low=1)
    epochs: float = param(1.0, "fit: passes over the training questions", low=0)
    batch: int = param(32, "fit: questions per step", low=1)
    lr: float = param(1e-3, "fit: peak learning rate", low=0)

    def stages(self, shape, knob):
        """round(r · V), at least one."""
        keep = self.ratio if knob is None else knob
        return [Stage(Site(0), max(1, round(keep * shape.tokens)))]

    def reduce(self, site, view, count, memory):
        """The most relevant ones."""
        kernels = [self.state[f"{layer}.weight"] for layer in range(self.layers)]
        biases = [self.state[f"{layer}.bias"] for layer in range(self.layers)]
        relevance = foretold(view, kernels, biases)
        index, valid = select.keep_prunable_top(relevance, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def fit(self, shape, keep, seed):
        """The network, whatever the budget."""
        return Explained(self, shape, seed)


def foretold(view, kernels, biases):
    """The network's relevance of every token, float32 [B, N]; -inf for those that have no row and column.

    Args:
        view: before the first layer.
        kernels: of the convolutions, [out, in, 3, 3] each.
        biases: of the convolutions, [out] each.
    """
    view.attention = view.signal("next_attention")
    rows, said = view.askers()
    paid = view.attention.rows(rows).masked_fill(~said[:, None, :, None], 0).sum(2)  # [B, H, N]
    image = view.prunable.unsqueeze(1)
    mean = (paid * image).sum(2, keepdim=True) / image.sum(2, keepdim=True).clamp_min(1)
    paid = (paid / mean.clamp_min(1e-12)).transpose(1, 2)

    cells = view.signal("cells")
    there = (cells[..., 0] >= 0) & view.prunable
    crop, row, column = cells[there].unbind(1)
    # Crops of other prompts' batches and smaller grids are zeros, as beyond the borders of an image.
    size = (cells.flatten(0, 1).amax(0).clamp_min(0) + 1).tolist()
    x = paid.new_zeros(*size, paid.shape[2])
    x[crop, row, column] = paid[there]
    real = torch.zeros(size, dtype=torch.bool, device=x.device)
    real[crop, row, column] = True
    x, real = x.permute(0, 3, 1, 2), real.unsqueeze(1)
    for place, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
        x = functional.conv2d(functional.relu(x) if place else x, kernel, bias, padding=KERNEL // 2) * real
    relevance = torch.full(there.shape, -torch.inf, device=x.device)
    return relevance.masked_scatter(there, x[crop, 0, row, column])


class Explained(Fit):
    """The cross-entropy of what the network foretells from what the answers came from; nothing leaves."""

    explains = True
    sites = (Site(0),)

    def __init__(self, method, shape, seed):
        super().__init__(shape)
        self.plan = Plan(method.epochs, method.batch, method.lr, warmup=0.03)
        self.watches = tuple(range(shape.depth))
        widths = [shape.heads, *[method.channels] * (method.layers - 1), 1]
        generator = torch.Generator().manual_seed(seed)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inner, outer in zip(widths, widths[1:], strict=False):
            weight = torch.randn(outer, inner, KERNEL, KERNEL, generator=generator)
            self.weights.append(weight * (2 / (inner * KERNEL**2)) ** 0.5)
            self.biases.append(torch.zeros(outer))

    def at(self, site, view, memory):
        """What the network says."""
        memory["said"], memory["image"] = foretold(view, self.weights, self.biases), view.prunable
        return Reduction.identity(*view.prunable.shape, view.prunable.device)

    def losses(self, outputs, labels, memory, dense):
        """Of the distributions over the image tokens that have a row and a column."""
        answers = memory["inputs"]["answers"]
        maps = [memory["attention"][layer] for layer in self.watches]
        gradients = torch.autograd.grad(-functional.cross_entropy(outputs, labels, reduction="sum"), maps)
        maps = [one.detach() for one in maps]
        told = attention_relevance(maps, gradients, functional.pad(answers[:, 1:], (0, 1)))
        image = memory["said"].isfinite() & memory["image"]
        return {"relevance": foretelling_loss(memory["said"], told, image)}

    def state(self):
        """The convolutions."""
        pairs = enumerate(zip(self.weights, self.biases, strict=True))
        return {
            f"{layer}.{name}": part.detach().clone()
            for layer, both in pairs
            for name, part in zip(("weight", "bias"), both, strict=True)
        }
