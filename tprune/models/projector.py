"""Image tokens leave between projector and decoder: each image, or crop, is shown to the method by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from inspect import signature
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from tprune.core.budget import PROJECTOR, Stage
from tprune.core.reduction import Reduction, gather_tokens
from tprune.errors import UserError
from tprune.methods.base import TokenMethod
from tprune.methods.views import Attention, TokenView
from tprune.models.layout import Unit, token_count, unit_seeds, units
from tprune.models.run import Inputs, Run
from tprune.models.taps import AttentionCall, Tap
from tprune.models.vlm import Anatomy, image_tokens


@dataclass(eq=False)
class Encoded:
    """One call of the model's `get_image_features`: what went in, and the attention of the projected block.

    `generate` makes this call ahead of the forward and hands its result on.
    """

    inputs: Inputs
    attention: AttentionCall | None


class Projector:
    """What happens at the site `PROJECTOR` of a vision-language model, until `remove`.

    Args:
        model, parts: the model and its anatomy.
        method: what chooses.
        stages_of: where tokens leave a unit of so many tokens, and how many are left.
        seed: of random draws, together with each image's own pixels.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Anatomy,
        method: TokenMethod,
        stages_of: Callable[[int], Sequence[Stage]],
        seed: int,
    ):
        self.model, self.parts, self.method, self.stages_of, self.seed = model, parts, method, stages_of, seed
        self.seen: AttentionCall | None = None
        self.latest: Encoded | None = None
        self.tap = None
        if "encoder" in method.reads:
            if parts.block is None:
                raise UserError(
                    f"{method.id} reads the attention of the class token, and this model has none"
                )
            self.tap = Tap([parts.block], self._observe)

        encode = parts.outer.get_image_features
        names = list(signature(encode).parameters)

        @wraps(encode)
        def encode_and_note(*args: Any, **kwargs: Any) -> Any:
            output = encode(*args, **kwargs)
            self.latest = Encoded(dict(zip(names, args, strict=False)) | kwargs, self.seen)
            output.tprune_encoded, self.seen = self.latest, None
            return output

        parts.outer.get_image_features = encode_and_note

    def remove(self) -> None:
        """Take the tap off the tower and the note off its call."""
        if self.tap is not None:
            self.tap.remove()
        self.parts.outer.__dict__.pop("get_image_features", None)
        self.tap = self.seen = self.latest = None

    def _observe(self, call: AttentionCall) -> None:
        self.seen = call

    def __call__(self, run: Run, embeds: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Shorten a batch of prompts.

        Args:
            run: this forward.
            embeds: [B, N, D], image embeddings merged.

        Returns:
            embeddings [B, K, D], their slots [B, K] and which of them are real [B, K] (None: all).
        """
        encoded = self._ahead(run.inputs) or self.latest
        found = self._units(encoded.inputs, run.prunable, self.method.unit == "crop")
        count = 1 + max(unit.image for unit in found)
        # Where every token goes: its own place, or (`gone`) nowhere.
        gone = run.length
        target = torch.arange(gone, device=embeds.device).repeat(len(embeds), 1)
        target = target.masked_fill(run.prunable, gone)
        whole, done = set(range(count)), []
        ordered = sorted(found, key=lambda unit: len(unit.slot))
        for _, group in groupby(ordered, key=lambda unit: len(unit.slot)):
            alike = list(group)
            view, counts = self._view(encoded, alike, embeds)
            left = counts[0] if len(set(counts)) == 1 else torch.tensor(counts)
            reduction = self.method.reduce(PROJECTOR, view, left, run.memory)
            for unit, kept in zip(alike, counts, strict=True):
                if kept < int((unit.slot >= 0).sum()):
                    whole.discard(unit.image)
            embeds = _place(alike, view, reduction, embeds, target)
            if run.trace is not None:
                done.append((alike, view, reduction))
        self._spare_newlines(found, whole, run, target)
        if run.trace is not None:
            run.note(PROJECTOR, *_heirs(done, target, gone))
        return _shorten(embeds, target, gone)

    def seeds(self, inputs: Inputs) -> Tensor:
        """A seed per prompt from the pixels of its images, int64 [B] on the CPU; 0 where there are none.

        For draws inside the decoder: a prompt draws the same in any batch, and for every beam.
        """
        mask, ahead = image_tokens(self.model, inputs), self._ahead(inputs)
        known = inputs if ahead is None else ahead.inputs
        images = self._units(known, mask, by_crop=False)
        seeds = [0] * len(mask)
        for unit, seed in zip(images, unit_seeds(known, images, self.seed).tolist(), strict=True):
            seeds[unit.row] = (31 * seeds[unit.row] + seed) % 2**62
        return torch.tensor(seeds)

    def _ahead(self, inputs: Inputs) -> Encoded | None:
        """The images of a forward whose inputs hold them encoded already, as `generate` does."""
        image = (inputs.get("mm_encoder_outputs") or {}).get("image")
        return getattr(image, "tprune_encoded", None)

    def _units(self, inputs: Inputs, mask: Tensor, by_crop: bool) -> list[Unit]:
        """Images or crops; where `generate` repeats every prompt for its beams, repeated with it."""
        repeats = max(1, len(mask) // self._prompts(inputs, mask))
        found = units(self.parts.outer, self.model.config, inputs, mask[::repeats], by_crop)
        if repeats == 1:
            return found
        images = 1 + max(unit.image for unit in found)
        return [
            replace(unit, row=unit.row * repeats + copy, image=unit.image + images * copy)
            for unit in found
            for copy in range(repeats)
        ]

    def _prompts(self, inputs: Inputs, mask: Tensor) -> int:
        """How many of the rows of `mask` were there when the images were encoded."""
        tokens, total = mask.sum(1), token_count(self.parts.outer, self.model.config, inputs)
        if total is None:
            return len(mask)
        repeats = int(tokens.sum()) // max(1, total)
        return len(mask) // max(1, repeats)

    def _view(self, encoded: Encoded, alike: list[Unit], embeds: Tensor) -> tuple[TokenView, list[int]]:
        """Units of equal size as one view; and how many tokens each keeps."""
        slot = torch.stack([unit.slot for unit in alike])
        there = slot >= 0
        row = torch.tensor([unit.row for unit in alike])
        tokens = there.sum(1).tolist()
        counts = [
            min([stage.count for stage in self.stages_of(count) if stage.site == PROJECTOR], default=count)
            for count in tokens
        ]
        whole = bool(there.all())
        slot, row, there = (part.to(embeds.device) for part in (slot.clamp_min(0), row, there))
        view = TokenView(
            embeds[row.unsqueeze(1), slot],
            there,
            whole=whole,
            depth=self.parts.depth,
            position=slot,
            real=there,
        )
        if "seeds" in self.method.reads:
            view.seeds = unit_seeds(encoded.inputs, alike, self.seed)
        if self.tap is not None:
            view.encoder = self._encoder(encoded.attention, [unit.crop for unit in alike])
            view.pool = self._pool
        return view, counts

    def _encoder(self, call: AttentionCall, crops: list[int]) -> TokenView:
        """What the tower saw of these crops."""
        query, key, value = call.query, call.key, call.value
        if crops != list(range(len(query))):
            chosen = torch.tensor(crops, device=query.device)
            query, key, value = (part[chosen] for part in (query, key, value))
        attention = Attention(query, key, value, call.scale)
        batch, length = query.shape[0], query.shape[2]
        prunable = torch.ones(batch, length, dtype=torch.bool, device=query.device)
        prunable[:, : self.parts.prefix] = False
        hidden = value.transpose(1, 2).flatten(2)
        return TokenView(hidden, prunable, prefix=self.parts.prefix, attention=attention)

    def _pool(self, score: Tensor) -> Tensor:
        """Scores of patches [B, P] as scores of image tokens [B, N]: the mean of those that make one."""
        if not hasattr(self.parts.outer, "pixel_shuffle"):
            return score
        side = round(score.shape[1] ** 0.5)
        grid = score.view(len(score), side, side, 1)
        return (
            self.parts.outer.pixel_shuffle(grid, scale_factor=self.model.config.downsample_ratio)
            .mean(-1)
            .flatten(1)
        )

    def _spare_newlines(self, found: list[Unit], whole: set[int], run: Run, target: Tensor) -> None:
        """Tokens between crops stay where nothing of their image leaves."""
        if self.method.unit != "crop":
            return
        member = torch.zeros_like(run.prunable)
        last: dict[int, tuple[int, int]] = {}
        for unit in found:
            slot = unit.slot[unit.slot >= 0]
            member[unit.row, slot.to(member.device)] = True
            low, high = last.get(unit.image, (run.length, -1))
            last[unit.image] = (min(low, int(slot.min())), max(high, int(slot.max())))
        rest = (run.prunable & ~member).nonzero().tolist()
        spans = [(unit.row, *last[unit.image], unit.image) for unit in found]
        for row, slot in rest:
            before = [image for at, low, _, image in spans if at == row and low <= slot]
            if before and max(before) in whole:
                target[row, slot] = slot


def _place(
    alike: list[Unit], view: TokenView, reduction: Reduction, embeds: Tensor, target: Tensor
) -> Tensor:
    """Send the tokens that are left to their places in the prompt, in the order the method gives."""
    row = (
        torch.tensor([unit.row for unit in alike], device=embeds.device)
        .unsqueeze(1)
        .expand_as(reduction.index)
    )
    slot = view.position.gather(1, reduction.index)
    real = torch.ones_like(slot, dtype=torch.bool) if reduction.valid is None else reduction.valid
    real = real & view.prunable.gather(1, reduction.index)
    far = torch.iinfo(torch.int64).max
    places = torch.where(real, slot, far).sort(dim=1).values
    rank = (real.cumsum(1) - 1).clamp_min(0)
    place = places.gather(1, rank)
    target[row[real], slot[real]] = place[real]
    if reduction.drops_only:
        return embeds
    embeds = embeds.clone()
    embeds[row[real], slot[real]] = reduction.apply(view.hidden)[real]
    return embeds


def _heirs(
    done: list[tuple[list[Unit], TokenView, Reduction]], target: Tensor, gone: int
) -> tuple[Tensor, Tensor]:
    """Every token's place in the prompt [B, N], and that of the token that stands for it, -1 where it left."""
    place = torch.arange(gone, device=target.device).expand_as(target)
    heirs = torch.where(target < gone, place, -1)
    for alike, view, reduction in done:
        row = torch.tensor([unit.row for unit in alike], device=target.device)
        row = row.unsqueeze(1).expand_as(view.position)[view.prunable]
        heirs[row, view.position[view.prunable]] = reduction.heirs(view.position)[view.prunable]
    return place, heirs


def _shorten(embeds: Tensor, target: Tensor, gone: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gather the tokens whose `target` [B, N] is below `gone`, in its order; shorter rows get fillers in front."""
    kept = (target < gone).sum(1)
    counts = kept.tolist()
    widest = max(counts)
    order = target.argsort(dim=1, stable=True)
    if len(set(counts)) == 1:
        index = order[:, :widest]
        return gather_tokens(embeds, index), index, None
    rank = torch.arange(widest, device=embeds.device) - (widest - kept).unsqueeze(1)
    index = order.gather(1, rank.clamp_min(0))
    return gather_tokens(embeds, index), index, rank >= 0
