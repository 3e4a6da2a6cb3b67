"""Recoverable Compression keeps the patches that stand out, visually or to the question, and recovers some of the rest.

How many stand out is told by local outlier factors, of the class token's attention and of the similarity to the text.
Of what is left over the most attended become centres that take up the tokens like them and close to the text; all
others are summed into one token more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tprune.core import ranks, select
from tprune.core.budget import PROJECTOR, Stage, scale_layer
from tprune.core.outliers import outlier_share
from tprune.core.reduction import Reduction, gather_tokens
from tprune.core.score import cosine_normalise
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class Recoverable(TokenMethod):
    """Visual filter, text recovery and merging of every crop, before the projector."""

    paper = Paper(
        title="Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided by Text Information",
        venue="AAAI",
        year=2025,
        arxiv="2409.01179",
        code="banjiuyufen/Recoverable-Compression",
        checked="code",
        notes="Two slips of the authors' code are kept and can be turned off (slips=false): centres are counted by the "
        "width of the features, and keys of the left-over tokens are looked up at the wrong places. Vision-language "
        "models carry no text tower: --set clip=NAME gives one (patches of the projected block, normalised as CLIP "
        "does, text pooled at its end; the authors do none of these). Without it the mean of the instruction's "
        "embeddings is compared with projected tokens. --keep shares its count out as `vision` and `text` say (ours).",
    )
    needs_cls = True
    reads = ("encoder", "projector")
    positions = "compact"
    unit = "crop"
    under_keep = {"counts": "keep"}
    projects = True

    wide: int = param(20, "neighbours of the outlier factor that counts what stands out", low=1)
    narrow: int = param(10, "neighbours of the one that counts centres", low=1)
    neighbours: int = param(32, "tokens that a centre takes up", low=1)
    weight: float = param(
        50.0, "of the text score beside the cosine of keys, in what a centre takes up", low=0
    )
    clip: str = param("", "the CLIP whose vision tower the model has: a folder, or its name on the hub")
    slips: bool = param(True, "as the authors' code, two slips included")
    vision: float = param(0.5, "with --keep: share of the visual filter", low=0, high=1)
    text: float = param(0.25, "with --keep: share of the text's recovery; the rest is merged", low=0, high=1)
    counts: str = param("image", "who says how many stay: each image, or --keep", choices=("image", "keep"))

    def encoder_blocks(self, depth):
        """The last block, which is not projected."""
        return (scale_layer(23, 24, depth),)

    def stages(self, shape, knob):
        """As many as stand out and are merged; with a budget round(r · N), at least one."""
        self.check_budget(knob)
        return [Stage(PROJECTOR, max(1, round((1.0 if knob is None else knob) * shape.tokens)))]

    def reduce(self, site, view, count, memory):
        """[what stands out | centres | one more], in this order."""
        there = view.prunable[:, view.prefix :]
        total = torch.as_tensor(count, device=there.device).expand(len(there))
        if not self.varies() and bool((total == there.sum(1)).all()):
            index, valid = select.keep_where(view.prunable)
            return Reduction.keep(index, view.hidden.shape[1], valid)
        attention, keys = self.tower(view)
        kept, score = self.outstanding(attention, self.relevance(view), there, total)
        rest = there & ~kept
        centres = self.centres(attention, rest, view, total - kept.sum(1))
        return self.merged(view, attention, keys, score, kept, rest, centres)

    def tower(self, view):
        """The class token's attention as of one wide head [B, N], and the keys [B, N, C], of the last block."""
        [block] = self.encoder_blocks(view.encoder.depth)
        seen = view.encoders[block]
        query, key = (
            x.transpose(1, 2).flatten(2).float() for x in (seen.attention.query, seen.attention.key)
        )
        logits = (query[:, :1] @ key.transpose(1, 2))[:, 0] * query.shape[2] ** -0.5
        return view.pool(logits.softmax(1)[:, seen.prefix :]), view.pool(key[:, seen.prefix :])

    def relevance(self, view):
        """u_i = cos(text, token i) / √d: float32 [B, N]."""
        if "clip" in view.signals:
            tokens, text = view.signal("clip")
        else:
            tokens = view.signal("projector")(view.hidden[:, view.prefix :])
            text = view.signal("text")
        mean = (text.hidden.float() * text.real.unsqueeze(2)).sum(1, keepdim=True)
        cosine = cosine_normalise(mean) @ cosine_normalise(tokens).transpose(1, 2)
        return cosine[:, 0] * tokens.shape[2] ** -0.5

    def outstanding(self, attention, score, there, total):
        """What the visual filter and the text keep, bool [B, N]; and the text scores, lowest where vision keeps."""
        number = there.sum(1)
        if self.varies():
            some = (number * outlier_share(attention, self.wide, there) + 1e-9).long()
        else:
            merged = total - (total * self.vision).round().long() - (total * self.text).round().long()
            # One merged token would be the sum of what is left over, without a centre.
            some = (total * self.vision).round().long() + torch.where(merged == 1, 1, 0)
        kept = select.best_of(attention, there, some)
        least = score.masked_fill(~there, torch.inf).amin(1, keepdim=True)
        score = torch.where(kept, least, score)
        if self.varies():
            more = ((number - some) * outlier_share(score, self.wide, there) + 1e-9).long()
            none = (some + more) == 0
            kept = kept | select.best_of(attention, there, none.long())
        else:
            more = (total * self.text).round().long()
        return kept | select.best_of(score, there & ~kept, more), score

    def centres(self, attention, rest, view, room):
        """The most attended of the rest, bool [B, N]; one token of the rest stays for the sum of the others."""
        number = rest.sum(1)
        if self.varies():
            base = view.hidden.shape[2] if self.slips else number
            count = (base * outlier_share(attention, self.narrow, rest) + 1e-9).long()
        else:
            count = room - 1
        return select.best_of(attention, rest, count.minimum(number - 1).clamp_min(0))

    def merged(self, view, attention, keys, score, kept, rest, centres):
        """The reduction over [prefix, N] tokens."""
        length, device = rest.shape[1], rest.device
        others = rest & ~centres
        one_more = select.best_of(attention, others, centres.any(1).long())
        place = torch.arange(length, device=device).expand_as(rest)
        turn = torch.where(kept, place, 4 * length)
        turn = torch.where(centres, length + ranks.rank(attention.masked_fill(~centres, -1)), turn)
        turn = turn.masked_fill(one_more, 3 * length)
        number = kept.sum(1) + centres.sum(1) + one_more.sum(1)
        widest = int(number.max())
        index = turn.argsort(dim=1, stable=True)[:, :widest]
        valid = torch.arange(widest, device=device) < number.unsqueeze(1)

        if self.slips:
            keys = gather_tokens(keys, (rest.cumsum(1) - 1).clamp_min(0))
        unit = cosine_normalise(keys, eps=1e-12)
        near = gather_tokens(unit, index) @ unit.transpose(1, 2) + self.weight * score.unsqueeze(1)
        own = torch.nn.functional.one_hot(index, length).bool()
        near = near.masked_fill(~rest.unsqueeze(1) | own, -torch.inf)
        best_near = near.topk(min(self.neighbours, length), dim=2)
        taken = torch.zeros_like(own).scatter(2, best_near.indices, best_near.values.isfinite())
        takes, sums = (part.gather(1, index).unsqueeze(2) for part in (centres, one_more))
        flow = (taken & takes) | (others.unsqueeze(1) & sums)
        dense = flow * attention.unsqueeze(1) + (own & ~sums)
        dense = torch.nn.functional.pad(dense, (view.prefix, 0))
        reduction = Reduction.mix(dense, index + view.prefix)
        return replace(reduction, valid=None if bool(valid.all()) else valid)
