"""Image tokens leave between projector and decoder: each image, or crop, is shown to the method by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import wraps
from inspect import signature
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from tprune.core.budget import PROJECTOR, Stage
from tprune.core.reduction import Reduction, gather_tokens
from tprune.methods.token_view import TokenView
from tprune.methods.tokens import TokenMethod
from tprune.models.clip import Clip
from tprune.models.encoder import Sight, Watch
from tprune.models.image_view import ImageViews, check
from tprune.models.layout import Unit, crop_table, newlines, real_crops, token_count, unit_seeds, units
from tprune.models.patch_site import PatchSite
from tprune.models.replaced import replaced
from tprune.models.run import Inputs, Run
from tprune.models.tower import TowerSite
from tprune.models.vlm import Anatomy, image_tokens


class Projector:
    """What happens at the site `PROJECTOR` of a vision-language model, until `remove`.

    Args:
        model, parts: the model and its anatomy.
        method: what chooses.
        stages_of: where tokens leave a unit of so many tokens, and how many are left.
        seed: of random draws, together with each image's own pixels.
        ascending: whether tokens stay in the order of their places, whatever order the method gives them.
        processor: of the model, or None.
        clip: the CLIP that the tower is of, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Anatomy,
        method: TokenMethod,
        stages_of: Callable[[int], Sequence[Stage]],
        seed: int,
        *,
        ascending: bool = False,
        processor: Any = None,
        clip: Clip | None = None,
    ):
        self.model, self.parts, self.method, self.stages_of, self.seed = model, parts, method, stages_of, seed
        self.ascending = ascending
        self.latest: Sight | None = None
        self.views = ImageViews(model, parts, method, seed, processor, clip)
        self.watch = Watch(parts, check(method, parts), "projector" in method.reads)
        blocks = method.tower_blocks(len(parts.blocks), parts.projected)
        self.inside = TowerSite(parts, blocks, method, stages_of) if blocks else None
        if method.before_tower:
            self.inside = PatchSite(parts, method, stages_of, self.views)

        encode = parts.outer.get_image_features
        names = list(signature(encode).parameters)

        @wraps(encode)
        def encode_and_note(*args: Any, **kwargs: Any) -> Any:
            self.watch.clear()
            given = real_crops(parts.outer, dict(zip(names, args, strict=False)) | kwargs)
            if self.inside is not None:
                self.inside.begin(given)
            output = encode(*args, **kwargs)
            self.latest = self.watch.take(given)
            self.latest.left = None if self.inside is None else self.inside.left()
            # `generate` makes this call ahead of the forward and hands its result on.
            output.tprune_sight = self.latest
            return output

        self.undo = ExitStack()
        self.undo.enter_context(replaced(parts.outer, encode_and_note, "get_image_features"))

    def remove(self) -> None:
        """Take the hooks off the tower and the note off its call."""
        self.watch.remove()
        if self.inside is not None:
            self.inside.remove()
        self.undo.close()
        self.latest = None

    def __call__(self, run: Run, embeds: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Shorten a batch of prompts.

        Args:
            run: this forward.
            embeds: [B, N, D], image embeddings merged.

        Returns:
            embeddings [B, K, D], their slots [B, K] and which of them are real [B, K] (None: all).
        """
        sight = self._ahead(run.inputs) or self.latest
        found = self._units(sight.inputs, run.prunable, self.method.unit == "crop")
        count = 1 + max(unit.image for unit in found)
        # Where every token goes: its own place, or (`gone`) nowhere.
        gone = run.length
        target = torch.arange(gone, device=embeds.device).repeat(len(embeds), 1)
        target = target.masked_fill(run.prunable, gone)
        whole, done = set(range(count)), []
        ordered = sorted(found, key=lambda unit: len(unit.slot))
        for _, group in groupby(ordered, key=lambda unit: len(unit.slot)):
            alike = list(group)
            view, counts = self.views.of(sight, alike, run, embeds), self._counts(alike)
            left = counts[0] if len(set(counts)) == 1 else torch.tensor(counts)
            reduction = self.method.reduce(PROJECTOR, view, left, run.memory)
            for unit, kept in zip(alike, counts, strict=True):
                if kept < int((unit.slot >= 0).sum()):
                    whole.discard(unit.image)
            embeds = self._place(alike, view, reduction, embeds, target)
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
        known = real_crops(self.parts.outer, inputs) if ahead is None else ahead.inputs
        images = self._units(known, mask, by_crop=False)
        seeds = [0] * len(mask)
        for unit, seed in zip(images, unit_seeds(known, images, self.seed).tolist(), strict=True):
            seeds[unit.row] = (31 * seeds[unit.row] + seed) % 2**62
        return torch.tensor(seeds)

    def cells(self, inputs: Inputs) -> Tensor:
        """Every image token's crop (counted over the batch), row and column in it: int64 [B, N, 3] on the CPU.

        -1 for text, for newlines, and where tokens form no rows and columns.
        """
        mask, sight = image_tokens(self.model, inputs), self._ahead(inputs) or self.latest
        found = torch.full((*mask.shape, 3), -1)
        for crop, unit in enumerate(self._units(sight.inputs, mask, by_crop=True)):
            grid = self.views.grid(sight, unit)
            if grid is not None:
                place = (unit.slot >= 0).nonzero().squeeze(1)
                cells = [torch.full_like(place, crop), place // grid[1], place % grid[1]]
                found[unit.row, unit.slot[place]] = torch.stack(cells, 1)
        return found

    def crops(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The crops that `cells` counts (`crop_table`), and the image tokens of none, bool [B, N]: on the CPU."""
        mask, sight = image_tokens(self.model, inputs), self._ahead(inputs) or self.latest
        found = self._units(sight.inputs, mask, by_crop=True)
        table = crop_table(self.parts.outer, self.model.config, sight.inputs, found)
        return table, newlines(found, mask)

    def encoded(self, inputs: Inputs) -> list[Tensor]:
        """What image tokens are made of behind each block of `TokenMethod.encoder_blocks`: [B, N, C] each.

        The mean of a token's patches; 0 for text and newlines.
        """
        mask, sight = image_tokens(self.model, inputs), self._ahead(inputs) or self.latest
        ordered = sorted(self._units(sight.inputs, mask, by_crop=False), key=lambda unit: len(unit.slot))
        groups = [list(group) for _, group in groupby(ordered, key=lambda unit: len(unit.slot))]
        found = []
        for block in self.method.encoder_blocks(len(self.parts.blocks)):
            width = sight.outputs[block].shape[-1]
            whole = sight.outputs[block].new_zeros(*mask.shape, width)
            for alike in groups:
                crops = [unit.crop + place for unit in alike for place in range(unit.crops)]
                made = sight.split(sight.outputs[block], crops)[:, self.parts.prefix :]
                row = torch.tensor([unit.row for unit in alike], device=whole.device).unsqueeze(1)
                slot = torch.stack([unit.slot for unit in alike]).to(whole.device)
                whole[row, slot] = self.views.pool(sight, alike, made)
            found.append(whole)
        return found

    def _ahead(self, inputs: Inputs) -> Sight | None:
        """The images of a forward whose inputs hold them encoded already, as `generate` does."""
        image = (inputs.get("mm_encoder_outputs") or {}).get("image")
        return getattr(image, "tprune_sight", None)

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

    def _counts(self, alike: list[Unit]) -> list[int]:
        """How many tokens each unit keeps."""
        tokens = [int((unit.slot >= 0).sum()) for unit in alike]
        return [
            min([stage.count for stage in self.stages_of(count) if stage.site == PROJECTOR], default=count)
            for count in tokens
        ]

    def _place(
        self, alike: list[Unit], view: TokenView, reduction: Reduction, embeds: Tensor, target: Tensor
    ) -> Tensor:
        """Send the tokens that are left to their places in the prompt, in the order the method gives."""
        index = reduction.index
        row = torch.tensor([unit.row for unit in alike], device=embeds.device).unsqueeze(1).expand_as(index)
        real = torch.ones_like(index, dtype=torch.bool) if reduction.valid is None else reduction.valid
        real = real & (view.prunable.gather(1, index) | (index < view.prefix))
        if view.prefix:
            _seat_prefix(view, index, real)
        slot = view.position.gather(1, index)
        place = slot
        if not self.ascending:
            places = torch.where(real, slot, torch.iinfo(torch.int64).max).sort(dim=1).values
            place = places.gather(1, (real.cumsum(1) - 1).clamp_min(0))
        target[row[real], slot[real]] = place[real]
        if reduction.drops_only and not (view.prefix and bool((index[real] < view.prefix).any())):
            return embeds
        values = reduction.apply(view.hidden)
        if self.method.projects:
            values = view.signal("projector")(values)
        embeds = embeds.clone()
        embeds[row[real], slot[real]] = values[real].to(embeds.dtype)
        return embeds

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


def _seat_prefix(view: TokenView, index: Tensor, real: Tensor) -> None:
    """Give the tower's prefix tokens the first places of their image that nothing else has."""
    taken = torch.zeros(view.prunable.shape, dtype=torch.int8, device=index.device)
    taken = taken.scatter_reduce(1, index, real.to(torch.int8), "amax")
    taken = torch.where(view.prunable, taken, 2)
    free = taken.argsort(dim=1, stable=True)[:, : view.prefix]
    view.position = torch.cat([view.position.gather(1, free), view.position[:, view.prefix :]], dim=1)


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
