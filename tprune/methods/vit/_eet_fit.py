"""How a model learns with eet (the paper's discriminative transfer): from its whole self, by codes of its logits."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tprune.core.budget import Site
from tprune.core.reduction import Reduction
from tprune.methods.fit import Fit, Plan

ROUNDS, RIDGE = 15, 1e-4


class Distilled(Fit):
    """The model itself and two heads that make codes of its logits, pruned and whole.

    Args:
        method: EET.
        shape: of the model.
        stages: where patches leave, and how many stay.
        seed: of initial values.
    """

    tunes = "all"

    def __init__(self, method, shape, stages, seed):
        super().__init__(shape)
        self.method, self.grid, self.whole = method, shape.grid, False
        self.counts = {stage.site: stage.count for stage in stages}
        self.last = Site(shape.depth - 1, between=True)
        self.sites = (*self.counts, self.last)
        self.plan = Plan(
            method.epochs, method.batch, method.lr, warmup=method.warmup, momentum=method.momentum
        )
        generator = torch.Generator().manual_seed(seed)
        shapes = (method.bits, shape.classes), (shape.classes, method.bits)
        values, signs = (
            torch.randn(one, generator=generator, dtype=torch.float64) for one in (shapes[0],) * 2
        )
        codes = class_codes(torch.eye(shape.classes, dtype=torch.float64), values, signs.sign())
        self.register_buffer("codes", codes.float())
        self.head, self.teacher = (nn.Linear(shape.classes, method.bits) for _ in range(2))
        nn.init.trunc_normal_(self.head.weight, std=0.02, generator=generator)
        self.teacher.weight.data.copy_(self.head.weight)
        for head in (self.head, self.teacher):
            nn.init.zeros_(head.bias)

    def at(self, site, view, memory):
        """As at inference, or nothing leaves; in the last block, what the class token attends to."""
        if site != self.last and not self.whole:
            return self.method.reduce(site, view, self.counts[site], memory)
        if site == self.last and self.whole:
            self.attended = self.method.worth(view).detach()
        return Reduction.identity(*view.hidden.shape[:2], view.hidden.device)

    def losses(self, outputs, labels, memory, dense):
        """The student's, also of images without what the teacher looks at most, and the teacher's own."""
        again, pixels, method = memory["again"], memory["inputs"], self.method
        self.whole = True
        taught = again(pixels)
        self.whole = False
        codes = self.codes[labels] if labels.dim() == 1 else labels @ self.codes
        task, own = (functional.cross_entropy(one, labels) for one in (outputs, taught))
        if method.hidden:
            hidden = again(hide(pixels, self.attended, method.hidden, self.grid))
            task = task + functional.cross_entropy(hidden, labels)
        code, pattern = self.head(outputs), self.teacher(taught)
        return {
            "task": method.task * task,
            "codes": functional.mse_loss(code, codes),
            "distillation": method.distillation
            * (1 - functional.cosine_similarity(code, pattern.detach())).mean(),
            "teacher": own + functional.mse_loss(pattern, codes),
        }

    def groups(self, model):
        """The heads, which begin from nothing, and the model, which does not."""
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [
            {"params": list(self.parameters()), "lr": self.method.head_lr or self.plan.lr},
            {"params": learned},
        ]

    def state(self):
        """Of the head whose signs are the codes: weight [bits, classes] and bias [bits]."""
        return {
            "head.weight": self.head.weight.detach().clone(),
            "head.bias": self.head.bias.detach().clone(),
        }


def hide(pixels, worth, count, grid):
    """Images without their `count` best patches.

    Args:
        pixels: [B, C, rows · h, columns · w].
        worth: [B, rows · columns], of patches row by row.
        count: at most all.
        grid: (rows, columns).
    """
    best = worth.topk(min(count, worth.shape[1]), dim=1).indices
    stays = torch.ones_like(worth).scatter(1, best, 0).unflatten(1, grid).unsqueeze(1)
    return pixels * functional.interpolate(stays, pixels.shape[2:]).to(pixels.dtype)


def class_codes(targets, values, signs):
    """Codes from which the class can be told by a linear map (the authors' alternating least squares).

    min ‖Y - U V‖² + δ ‖B - R V‖² over U, V, a rotation R, and signs B, each in turn.

    Args:
        targets: Y [C, n], one-hot columns.
        values: V [bits, n], to begin with.
        signs: B [bits, n] of ±1, to begin with.

    Returns:
        Bᵀ [n, bits].
    """

    def rotation():
        left, _, right = torch.linalg.svd(signs @ values.T)
        return left @ right

    turn = rotation()
    for _ in range(ROUNDS):
        signs = torch.where(turn @ values >= 0, 1.0, -1.0).to(values.dtype)
        guess = targets @ values.T @ torch.linalg.pinv(values @ values.T)
        inverse = torch.linalg.pinv(guess.T @ guess + RIDGE * turn.T @ turn)
        values = inverse @ (guess.T @ targets + RIDGE * turn.T @ signs)
        turn = rotation()
    return signs.T
