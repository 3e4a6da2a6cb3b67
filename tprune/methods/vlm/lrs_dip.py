"""LRS-VQA's pruning looks at a large image from coarse to fine, with a few of the decoder's layers, copied.

The copies read the prompt and say which image tokens the question looks at. In the image as a whole these vote for the
tiles, in finer resolution, that are worth reading; of what these hold the tokens stay that the question looks at then.
The copies learn from the attention of the layers that they are of; the model stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tprune.core import attending, grid, select
from tprune.core.budget import Site, Stage, scale_layer
from tprune.core.explain import foretelling_loss
from tprune.core.reduction import Reduction
from tprune.core.score import quantile_scaled
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.fit import Fit, Plan
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class LRSDIP(TokenMethod):
    """The image as a whole stays; of the tiles voted for, int(n · r) tokens, and the ends of all rows."""

    kind = "trained"
    learns = "required"
    paper = Paper(
        title="When Large Vision-Language Model Meets Large Remote Sensing Imagery: Coarse-to-Fine Text-Guided Token "
        "Pruning",
        venue="ICCV",
        year=2025,
        arxiv="2503.07588",
        code="VisionXLab/LRS-VQA",
        checked="code",
        notes="Of the pyramid it has the two levels that LLaVA-NeXT's and LLaVA-OneVision's inputs hold: the whole "
        "image, which is the authors' thumbnail too, and its tiles; other models have one, without a vote. All tiles "
        "go through the tower first (the authors encode those voted for alone). Cells alone vote: the whole has no row "
        "ends here, which vote in the code, each for the last tile of its row. Cells that are not read are not there "
        "(by the authors' mask their logits in the score gain 1). Training is not public (ours: by the cross-entropy "
        "from each head's attention); ours too: which layers, and that --keep takes the whole, row ends, voted tiles.",
    )
    reads = ()
    positions = "compact"
    under_keep = {"counts": "keep"}
    built_in = {"epochs": 1.0, "batch": 16, "lr": 3e-4}

    layers: tuple[int, ...] = param(
        (8, 14, 20, 26), "whose copies, and one of that before, score; of 32", low=1
    )
    ratio: float = param(0.25, "r: fraction that votes, and that stays of the tiles", low=0, high=1)
    threshold: float | None = param(
        None,
        "of scores from their 5% to their 95% quantile, above which tokens of tiles stay instead",
        low=0,
        high=1,
    )
    counts: str = param("image", "who says how many stay: each prompt, or --keep", choices=("image", "keep"))
    epochs: float = param(1.0, "fit: passes over the training questions", low=0)
    batch: int = param(32, "fit: questions per step", low=1)
    lr: float = param(2e-5, "fit: peak learning rate", low=0)

    def copied(self, depth):
        """The layers that are copied: the one before the first, and those whose attention is learned."""
        layers = sorted({max(1, scale_layer(layer, 32, depth)) for layer in self.layers})
        return [layers[0] - 1, *layers]

    def stages(self, shape, knob):
        """Any number before the first layer; with --keep round(r · V), at least one."""
        self.check_budget(knob)
        return [Stage(Site(0), max(1, round((1.0 if knob is None else knob) * shape.tokens)))]

    def check(self, shape):
        """Copies are of two layers at least."""
        if shape.depth < 2:
            raise UserError(f"{self.id} copies layers of the decoder, and one alone is not enough")

    def reduce(self, site, view, count, memory):
        """Coarse tokens vote, and the tokens of what is read then are scored with nothing of the other tiles there."""
        cells, image = view.signal("cells"), view.prunable
        crops, between = view.signal("crops")
        whole, read = torch.zeros_like(image), image
        score = torch.zeros(image.shape, device=image.device)
        if bool((crops[:, 1] >= 0).any()):
            whole, tiled = levels(cells, crops)
            score = self.focus(view, ~image | whole, whole, "compact")
            votes = select.best_of(score, whole, (whole.sum(1) * self.ratio).long())
            read = image & (~tiled | grid.voted_tiles(cells, crops, votes))
        local = read & ~whole
        score = torch.where(whole, score, self.focus(view, ~image | read, local, "original"))
        if not self.varies():
            order = score.argsort(dim=1, descending=True, stable=True)
            rank = torch.where(whole, 4, torch.where(between, 3, torch.where(local, 2, image.long())))
            order = order.gather(1, rank.gather(1, order).argsort(dim=1, descending=True, stable=True))
            index, valid = select.keep_first(order, count, image)
        else:
            stays = self.chosen(score, local) | whole | between | ~image
            index, valid = select.keep_where(stays)
        return Reduction.keep(index, image.shape[1], valid)

    def focus(self, view, part, local, positions):
        """What the last token of the prompt pays each `local` token, among these, mean over heads: float32 [B, N].

        Args:
            view: before the first layer.
            part: bool [B, N], what the copies read.
            local: bool [B, N], of it.
            positions: of what is read, as `Copies.read` takes it.
        """
        index, valid = select.keep_where(part)
        there = local.gather(1, index) if valid is None else local.gather(1, index) & valid
        copies = view.signal("copies")
        layers = self.state["layers"].tolist()
        attention = copies.read(layers, self.state, (index, valid), positions)[-1]
        asks = (index == view.last).int().argmax(1)
        logits = asked(attention, asks).masked_fill(~there.unsqueeze(1), -torch.inf)
        # Prompts without such tokens have no softmax.
        paid = logits.softmax(2).mean(1).nan_to_num().masked_fill(~there, 0)
        return torch.zeros(part.shape, device=paid.device).scatter_add(1, index, paid)

    def chosen(self, score, local):
        """Which of the `local` tokens stay, at least one: bool [B, N]."""
        if self.threshold is not None:
            return select.above(quantile_scaled(score, local), local, self.threshold)
        return select.best_of(score, local, (local.sum(1) * self.ratio).long().clamp_min(1))

    def fit(self, shape, keep, seed):
        """The copies, whatever the budget."""
        return Distilled(self, shape)


def levels(cells, crops):
    """Which tokens show an image as a whole that has tiles as well, and which are of tiles: bool [B, N] each.

    Args:
        cells, crops: as `grid.voted_tiles` takes them.
    """
    tiled = crops[:, 1] >= 0
    whole = ~tiled & torch.isin(crops[:, 0], crops[tiled, 0])
    crop = cells[..., 0]
    return tuple(one.to(cells.device)[crop.clamp_min(0)] & (crop >= 0) for one in (whole, tiled))


def asked(attention, row):
    """The logits of one query per prompt, at `row` int64 [B], to all keys: float32 [B, H, N]."""
    query = attention.query.gather(2, row[:, None, None, None].expand_as(attention.query[:, :, :1]))
    return attending.attention_logits(query, attention.key, attention.scale, None, attention.softcap)[:, :, 0]


class Distilled(Fit):
    """Every copy's attention from the prompt's last token to the image becomes that of its layer; nothing leaves."""

    answers = False
    sites = (Site(0),)

    def __init__(self, method, shape):
        super().__init__(shape)
        self.plan = Plan(method.epochs, method.batch, method.lr, warmup=0.03)
        self.copied = method.copied(shape.depth)
        self.watches = tuple(self.copied[1:])
        self.names, self.parts, self.dtype = [], nn.ParameterList(), torch.float32

    def begin(self, forwards):
        """The copies start as the layers are."""
        own = next(forwards)["own"]
        self.names, self.dtype = list(own), next(iter(own.values())).dtype
        self.parts = nn.ParameterList([part.float().clone() for part in own.values()])

    def at(self, site, view, memory):
        """What the copies pay the image, [B, H, N] each."""
        copies = view.signal("copies")
        memory["image"], memory["last"] = view.prunable, view.last
        if not self.names:
            memory["own"] = copies.weights(self.copied)
        else:
            weights = dict(zip(self.names, self.parts, strict=True))
            read = copies.read(self.copied, weights)
            memory["paid"] = [asked(attention, view.last[:, 0]) for attention in read]
        return Reduction.identity(*view.prunable.shape, view.prunable.device)

    def losses(self, outputs, labels, memory, dense):
        """The mean over copies and heads."""
        image, found = memory["image"], []
        for layer, paid in zip(self.watches, memory["paid"], strict=True):
            wanted = attending.map_rows(memory["attention"][layer], memory["last"])[:, :, 0]
            there = image.repeat_interleave(paid.shape[1], dim=0)
            found.append(foretelling_loss(paid.flatten(0, 1), wanted.flatten(0, 1), there))
        return {"attention": sum(found) / len(found)}

    def state(self):
        """Which layers are copied, and the copies' weights, in the type of the layers; none before the first step."""
        found = {"layers": torch.tensor(self.copied)}
        for name, part in zip(self.names, self.parts, strict=True):
            found[name] = part.detach().to(self.dtype, copy=True)
        return found
