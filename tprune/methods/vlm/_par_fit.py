"""How par's router learns: of its own noisy choices the one that keeps the answer best is to be likelier."""

from __future__ import annotations

import torch
from torch.nn import functional

from tprune.core import select
from tprune.core.reduction import Reduction
from tprune.methods.fit import Fit, Plan
from tprune.methods.vlm._router import empty


class Preferring(Fit):
    """Noisy choices; the one that keeps the answer best shall be likelier than the one that keeps it worst."""

    def __init__(self, method, shape, stages, seed):
        super().__init__(shape)
        self.method, self.plan = method, Plan(method.epochs, method.batch, method.lr, warmup=0.03)
        plain = [stage for stage in stages if not stage.skips]
        self.sites = tuple(stage.site for stage in plain)
        self.share = plain[-1].count / shape.tokens
        self.passed = sum(stage.skips for stage in stages) // 2
        inner = max(1, round(method.inner * shape.width))
        router = empty(method.depth, shape.width, shape.heads, inner, shape.depth).to_empty(device="cpu")
        self.router = router.begin(torch.Generator().manual_seed(seed))

    def at(self, site, view, memory):
        """A choice of the router with noise on its attention."""
        if site.layer:
            self.choice["tokens"] = stays = self.chosen(memory["tokens"], view.prunable)
            index, valid = select.keep_where(stays | ~view.prunable)
            return Reduction.keep(index, view.hidden.shape[1], valid)
        with torch.no_grad():
            memory["tokens"], layers = self.router(view.hidden, view.real, self.generator)
        memory["passes"] = passes = self.method.passes(layers, torch.full((len(layers),), self.passed))
        self.choice = {"prompt": (view.hidden, view.real, view.prunable), "layers": ~passes}
        return Reduction.identity(*view.prunable.shape, view.hidden.device)

    def chosen(self, logits, image):
        """The image tokens that stay, at least one of a prompt that has any: bool [B, N]."""
        counts = [max(1, select.floor_count(number, self.share)) for number in image.sum(1).tolist()]
        index, valid = select.keep_prunable_top(logits, torch.tensor(counts), image)
        return select.mark(index, valid, image.shape[1]) & image

    def losses(self, outputs, labels, memory, dense):
        """-log σ(β (likelihood of the best choice - of the worst)), and the probabilities of staying."""
        inputs, again = memory["inputs"], memory["again"]
        with torch.no_grad():
            wanted = dense().softmax(-1)
            worths, choices = [self.worth(outputs, wanted, inputs["answers"])], [self.choice]
            for _ in range(self.method.flows - 1):
                worths.append(self.worth(again(inputs), wanted, inputs["answers"]))
                choices.append(self.choice)
        hidden, real, image = self.choice["prompt"]
        tokens, layers = self.router(hidden, real)
        likely = torch.stack([likelihood(tokens, layers, image, choice) for choice in choices])
        worth = torch.stack(worths)
        best, least = (likely.gather(0, place[None])[0] for place in (worth.argmax(0), worth.argmin(0)))
        staying = (tokens.sigmoid() * image).sum() / image.sum() + layers.sigmoid().mean()
        return {
            "preference": -functional.logsigmoid(self.method.strength * (best - least)).mean(),
            "sparsity": self.method.sparsity * staying,
        }

    def worth(self, logits, wanted, answers):
        """How well the answers are kept: the dense model's expected log-probability under `logits`, sums [B]."""
        row = answers.nonzero()[:, 0]
        each = (wanted * logits.log_softmax(-1)).sum(-1)
        return each.new_zeros(len(answers)).index_add(0, row, each)

    def state(self):
        """The router."""
        return {name: tensor.detach().clone() for name, tensor in self.router.state_dict().items()}


def likelihood(tokens, layers, image, choice):
    """The mean log-likelihood of a choice of image tokens, and that of its layers, together: [B].

    Args:
        tokens, layers: logits of staying, [B, N] and [B, L].
        image: bool [B, N].
        choice: "tokens" bool [B, N] and "layers" bool [B, L], what stays.
    """
    said = functional.logsigmoid(torch.where(choice["tokens"], tokens, -tokens)) * image
    through = functional.logsigmoid(torch.where(choice["layers"], layers, -layers))
    return said.sum(1) / image.sum(1).clamp_min(1) + through.mean(1)
