"""What a method sees at a vision-language model's projector: image tokens, and behind them tower, pixels and text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tprune.core.reduction import gather_tokens
from tprune.errors import UserError
from tprune.methods.token_view import TokenView
from tprune.methods.tokens import TokenMethod
from tprune.models.clip import Clip
from tprune.models.encoder import Sight
from tprune.models.layout import Unit, members, pack, pair, unit_seeds
from tprune.models.pixels import normalisation
from tprune.models.run import Run
from tprune.models.vlm import Anatomy


class ImageViews:
    """Makes the views of images, or crops, that a method is given.

    Args:
        model, parts: the model and its anatomy.
        method: whose `reads` say what is shown.
        seed: of random draws.
        processor: of the model, to tell how pixels were normalised; None where there is none.
        clip: the CLIP that the tower is of, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Anatomy,
        method: TokenMethod,
        seed: int,
        processor: Any = None,
        clip: Clip | None = None,
    ):
        self.config, self.parts, self.method = model.config, parts, method
        self.seed, self.processor, self.clip = seed, processor, clip
        self.embed = model.get_input_embeddings()
        self.packs = hasattr(parts.outer, "pack_image_features")

    def of(self, sight: Sight, alike: list[Unit], run: Run, embeds: Tensor) -> TokenView:
        """Units of equally many tokens (padding of a crop included) as one view.

        Signals, each computed when it is asked for:

        - "features" [B, N, C], what the projector makes the tokens of, and "projector", the projector as a callable
          [..., C] -> [..., D] (for methods that read "projector");
        - "text", a view of the prompt's text behind its last image (all of it where there is none), [B, M, D] with
          `real`; its own signals are "ids", the tokens, int64 [B, M], and "reworded", which gives the view of the text
          as a function str -> str leaves it;
        - "rows", whose prompt each unit is in, int64 [B];
        - "patches", the pixels of the encoder's patches, 0 to 1, float32 [E, P, channels, n];
        - "pixels", those of every token as the tower sees them, float32 [B, N, channels, rows, columns];
        - "thumbnail", bool [B, N], the tokens of the crop that shows the whole image;
        - "newlines", bool [B, N], tokens that no patch makes;
        - "left", bool [B, N], what a method left inside the tower (there where it could);
        - "clip", the tokens [B, N, d] and a view of the text's segments in the space of a CLIP (where one is given).
        """
        slot = torch.stack([unit.slot for unit in alike])
        there = slot >= 0
        row = torch.tensor([unit.row for unit in alike])
        whole = bool(there.all())
        slot, row, there = (part.to(embeds.device) for part in (slot.clamp_min(0), row, there))
        crops = [unit.crop + place for unit in alike for place in range(unit.crops)]
        view = TokenView(
            embeds[row.unsqueeze(1), slot],
            there,
            whole=whole,
            depth=self.parts.depth,
            grid=self.grid(sight, alike[0]),
            position=slot,
            real=there,
            pool=partial(self.pool, sight, alike),
        )
        view.signals = {
            "text": partial(self._text, run, embeds, row),
            "rows": lambda: row,
            "patches": partial(sight.patches, crops, normalisation(self.processor)),
            "pixels": partial(self._pixels, sight, alike, crops),
            "thumbnail": partial(self._thumbnail, sight, alike, slot.device),
            "newlines": partial(self._newlines, sight, alike, slot.device),
        }
        if sight.left is not None:
            view.signals["left"] = lambda: view.pool(sight.split(sight.left, crops).float()) > 0
        if "seeds" in self.method.reads:
            view.seeds = unit_seeds(sight.inputs, alike, self.seed)
        if "encoder" in self.method.reads:
            blocks = [self.parts.projected, *self.method.encoder_blocks(len(self.parts.blocks))]
            view.encoders = {block: sight.block(block, crops) for block in dict.fromkeys(blocks)}
            view.encoder = view.encoders[self.parts.projected]
        if self.clip is not None:
            view.signals["clip"] = partial(self._in_clip, view)
        if "projector" in self.method.reads:
            view.signals["projector"] = lambda: sight.project
            view.signals["features"] = lambda: self._arrange(sight, alike, sight.features(crops))
        return self._before_projector(view) if self.method.projects else view

    def of_pixels(self, sight: Sight, alike: list[Unit]) -> TokenView:
        """Images of one size, one crop each, before the tower has seen them: their grid and the signal "pixels"."""
        there = torch.ones(len(alike), len(alike[0].slot), dtype=torch.bool)
        there = there.to(sight.inputs["pixel_values"].device)
        view = TokenView(there.unsqueeze(2), there, real=there, grid=self.grid(sight, alike[0]))
        view.signals["pixels"] = partial(self._pixels, sight, alike, [unit.crop for unit in alike])
        return view

    def _pixels(self, sight: Sight, alike: list[Unit], crops: list[int]) -> Tensor:
        """The pixels of every token; of a video's patch those of its first frame."""
        size = pair(self.parts.patch)
        patches = sight.pixels(crops).unflatten(3, (-1, *size))[:, :, :, 0]
        members = self._members(sight, patches.shape[1])
        if members is not None:
            side = math.isqrt(members.shape[1])
            blocks = patches[:, members.sort(1).values.to(patches.device)].unflatten(2, (side, side))
            patches = blocks.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
        return self._arrange(sight, alike, patches)

    def _text(self, run: Run, embeds: Tensor, rows: Tensor) -> TokenView:
        """The text of these rows, with the means to put it in other words where there is a tokenizer."""
        text = text_of(run, embeds, rows)
        tokenizer = getattr(self.processor, "tokenizer", None)
        text.signals["reworded"] = lambda: (
            (lambda rewrite: text) if tokenizer is None else partial(reworded, text, tokenizer, self.embed)
        )
        return text

    def _in_clip(self, view: TokenView) -> tuple[Tensor, TokenView]:
        """Image tokens and text in the space of CLIP: [B, N, d], and a view of the segments [B, M, d]."""
        tokenizer = getattr(self.processor, "tokenizer", None)
        if tokenizer is None:
            raise UserError(
                f"{self.method.id} reads the prompt's text, and the model has no tokenizer beside it"
            )
        patches = view.encoder.hidden[:, view.encoder.prefix :]
        return view.pool(self.clip.image(patches)), self.clip.text(told(view.signal("text"), tokenizer))

    def _before_projector(self, view: TokenView) -> TokenView:
        """The same tokens before the projector, behind the tower's class token where that could be projected too."""
        features, tower = view.signal("features"), view.encoder
        alike = tower.hidden.shape[0] == features.shape[0] and tower.hidden.shape[2] == features.shape[2]
        prefix = tower.prefix if alike else 0
        front = tower.hidden[:, :prefix] if prefix else features[:, :0]
        view.hidden = torch.cat([front, features], dim=1)
        head = view.prunable.new_zeros(len(features), prefix)
        view.prunable = view.real = torch.cat([head, view.prunable], dim=1)
        view.position = torch.cat([head.long(), view.position], dim=1)
        view.prefix, view.has_cls = prefix, prefix > 0
        return view

    def pool(self, sight: Sight, alike: list[Unit], x: Tensor) -> Tensor:
        """What patches have [E, P, ...], for the tokens of these units [B, N, ...]; see `TokenView.pool`."""
        members = self._members(sight, x.shape[1])
        if members is not None:
            x = x[:, members.to(x.device)].mean(2, dtype=x.dtype)
        return self._arrange(sight, alike, x)

    def _members(self, sight: Sight, patches: int) -> Tensor | None:
        """The patches of every token of one crop, int64 [tokens, n]; None where each patch is a token."""
        outer = self.parts.outer
        if sight.lengths is not None:
            merge = self.parts.merge**2
            return None if merge == 1 else torch.arange(patches).view(-1, merge)
        return members(outer, self.config, patches)

    def _arrange(self, sight: Sight, alike: list[Unit], x: Tensor) -> Tensor:
        """What the tokens of crops have [E, n, ...], for the tokens of these units; packed as the model does it."""
        if not self.packs or (self.method.unit == "crop" and all(unit.crops == 1 for unit in alike)):
            return x.reshape(len(alike), -1, *x.shape[2:])
        flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
        parts = flat.split([unit.crops for unit in alike])
        whole = [
            torch.cat([part.new_zeros(unit.before, *part.shape[1:]), part])
            for unit, part in zip(alike, parts, strict=True)
        ]
        images = [unit.image % len(sight.inputs["image_sizes"]) for unit in alike]
        packed = pack(self.parts.outer, self.config, sight.inputs, images, whole)
        rows = [tokens[unit.place.to(x.device)] for unit, tokens in zip(alike, packed, strict=True)]
        return torch.stack(rows).view(len(alike), -1, *x.shape[2:])

    def _newlines(self, sight: Sight, alike: list[Unit], device: torch.device) -> Tensor:
        """Which tokens no patch makes: the ends of the rows of LLaVA-NeXT's crops."""
        marks = [torch.ones(unit.crops, self.parts.tokens or len(unit.slot)) for unit in alike]
        return self._arrange(sight, alike, torch.cat(marks)).to(device) < 0.5

    def _thumbnail(self, sight: Sight, alike: list[Unit], device: torch.device) -> Tensor:
        """Which tokens show the whole image: the first of LLaVA-NeXT's crops, the last of InternVL's tiles."""
        first = 0 if self.packs else -1
        marks = []
        for unit in alike:
            per_crop = self.parts.tokens or len(unit.slot)
            mark = torch.zeros(unit.crops, per_crop)
            mark[first] = 1
            marks.append(mark)
        return self._arrange(sight, alike, torch.cat(marks)).to(device) > 0.5

    def grid(self, sight: Sight, unit: Unit) -> tuple[int, int] | None:
        """Rows and columns of a unit's tokens, where they are one."""
        thw = sight.inputs.get("image_grid_thw")
        if thw is not None:
            _, rows, columns = thw[unit.image % len(thw)].tolist()
            found = (rows // self.parts.merge, columns // self.parts.merge)
        elif unit.crops > 1:
            return None
        else:
            found = (round(len(unit.slot) ** 0.5),) * 2
        return found if found[0] * found[1] == len(unit.slot) else None


def text_of(run: Run, embeds: Tensor, rows: Tensor) -> TokenView:
    """The text behind the last image of each of these rows, or all of it where there is none.

    Args:
        run: this forward.
        embeds: [prompts, N, D].
        rows: int64 [B], prompts.
    """
    text = run.real & ~run.prunable
    place = torch.arange(run.length, device=text.device)
    last = (place * run.prunable).amax(1, keepdim=True)
    behind = text & (place > last)
    text = torch.where(behind.any(1, keepdim=True), behind, text)[rows]
    count = int(text.sum(1).max())
    index = text.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
    real = text.gather(1, index)
    hidden = gather_tokens(embeds[rows], index)
    ids = run.inputs["input_ids"][rows].gather(1, index)
    return TokenView(
        hidden, torch.zeros_like(real), whole=False, position=index, real=real, signals={"ids": lambda: ids}
    )


def told(text: TokenView, tokenizer: Any) -> list[str]:
    """What the tokens of each row say, without special tokens."""
    pairs = zip(text.signal("ids"), text.real, strict=True)
    return [tokenizer.decode(ids[real], skip_special_tokens=True) for ids, real in pairs]


def reworded(
    text: TokenView, tokenizer: Any, embed: Callable[[Tensor], Tensor], rewrite: Callable[[str], str]
) -> TokenView:
    """The embeddings of what `rewrite` makes of each row's text, without special tokens.

    Args:
        text: see `text_of`.
        tokenizer: of the model.
        embed: from tokens to embeddings.
        rewrite: from a row's text to what shall stand for it.
    """
    found = [tokenizer(rewrite(row), add_special_tokens=False)["input_ids"] for row in told(text, tokenizer)]
    rows = [torch.tensor(row, dtype=torch.int64) for row in found]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(text.hidden.device)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    real = torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
    return TokenView(embed(ids), torch.zeros_like(real), whole=False, real=real, signals={"ids": lambda: ids})


def check(method: TokenMethod, parts: Anatomy) -> Sequence[int]:
    """The blocks of the tower that `method` sees.

    Raises:
        UserError: the model lacks something that it reads.
    """
    if "projector" in method.reads and parts.projector is None:
        raise UserError(f"{method.id} reads what goes into the projector, and this model's cannot be told")
    if "encoder" not in method.reads:
        return ()
    if not parts.blocks:
        raise UserError(f"{method.id} reads the vision tower's attention, and its blocks cannot be told")
    return tuple(dict.fromkeys([parts.projected, *method.encoder_blocks(len(parts.blocks))]))
