"""How dtop's heads are learned: each names all patches, after its block, and none leaves."""

from __future__ import annotations

import torch
from torch import nn

from tprune.methods.fit import Fit, Plan
from tprune.methods.vit._dtop_heads import make


class Exits(Fit):
    """A head at every exit and one after the last block; the sum of their losses."""

    def __init__(self, method, shape, seed):
        super().__init__(shape)
        self.threshold = method.threshold
        self.tunes = "all" if method.tune else "nothing"
        self.sites = tuple(method.sites(shape.depth))
        self.plan = Plan(
            method.epochs, method.batch, method.lr, warmup=method.warmup, weight_decay=method.weight_decay
        )
        generator = torch.Generator().manual_seed(seed)
        size = shape.width, shape.names or shape.classes + 1, method.channels, method.heads, method.decoder
        self.heads = nn.ModuleList(make(method.head, *size) for _ in range(len(self.sites) + 1))
        for name, parameter in self.heads.named_parameters():
            if name.endswith("queries"):
                nn.init.normal_(parameter, generator=generator)
            elif parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def at(self, site, view, memory):
        """Name the patches; all of them go on."""
        self.finish(view, memory)
        return view.hidden

    def finish(self, view, memory):
        """Name the patches, by the head whose turn it is."""
        said = memory.setdefault("said", [])
        said.append(self.heads[len(said)](view.hidden[:, view.prefix :].float()))

    def losses(self, outputs, labels, memory, dense):
        """Of every head, with the name that covers most of a patch."""
        name = labels.argmax(-1)
        parts = [head.loss(*said, name) for head, said in zip(self.heads, memory["said"], strict=True)]
        return {f"exit {place + 1}": part for place, part in enumerate(parts[:-1])} | {"last": parts[-1]}

    def groups(self, model):
        """Heads ten times as fast as the model."""
        groups = [{"params": list(self.parameters()), "lr": 10 * self.plan.lr}]
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return groups + [{"params": learning}] * bool(learning)

    def state(self):
        """The heads, and the threshold, which is set anew where there is a budget to meet."""
        found = {name: tensor.detach().clone() for name, tensor in self.heads.state_dict().items()}
        return found if self.threshold is None else found | {"threshold": torch.tensor(self.threshold)}
