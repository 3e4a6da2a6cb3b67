"""Patches leave inside a vision tower, before they are projected.

Behind some blocks of the tower the method chooses as it will at the projector; from there on the blocks work on what is
left. To everything around them they look as if nothing had happened: their outputs have their full length, and patches
that left keep the value they left with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tprune.core.budget import PROJECTOR, Stage
from tprune.core.reduction import gather_tokens
from tprune.core.select import keep_where, mark
from tprune.methods.token_view import TokenView
from tprune.methods.tokens import TokenMethod
from tprune.models.layout import packed_crops, patches_per_crop
from tprune.models.run import Inputs
from tprune.models.signals import attention_of
from tprune.models.taps import AttentionCall, Tap
from tprune.models.track import hidden_value
from tprune.models.vlm import Anatomy


class TowerSite:
    """Lets patches leave behind blocks of a tower that makes one image token of each, until `remove`.

    Other towers (which merge patches, or see all images as one sequence) run in full, and so does one whose crops'
    mosaic is resized: what leaves, leaves at the projector.

    Args:
        parts: of the model.
        blocks: behind which patches may leave; the method sees their attention over what is left so far.
        method: what chooses; at all blocks of one call it is given the same `memory`, and the signal "remaining", how
            many of the blocks are still to come.
        stages_of: where a crop of so many tokens loses them, and how many are left in the end.
    """

    def __init__(
        self,
        parts: Anatomy,
        blocks: Sequence[int],
        method: TokenMethod,
        stages_of: Callable[[int], Sequence[Stage]],
    ):
        self.parts, self.blocks, self.method, self.stages_of = parts, blocks, method, stages_of
        self.active, self.there, self.memory = False, None, {}
        # What is left of every crop [E, K], which of it is real (None: all), and all of it with its latest values.
        self.index: Tensor | None = None
        self.valid: Tensor | None = None
        self.full: Tensor | None = None
        self.tap = Tap([attention_of(parts.blocks[block]) for block in blocks], self._observe)
        self.handles = []
        for place, block in enumerate(parts.blocks[blocks[0] :], blocks[0]):
            if place > blocks[0]:
                self.handles.append(block.register_forward_pre_hook(self._shorten, with_kwargs=True))
            # Outputs are full again before anybody else sees them.
            self.handles.append(block.register_forward_hook(partial(self._behind, place), prepend=True))

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self.handles:
            handle.remove()
        self.tap.remove()
        self.handles, self.index, self.valid, self.full, self.there = [], None, None, None, None
        self.memory = {}

    def begin(self, inputs: Inputs) -> None:
        """Images come; `inputs` of the call, by name."""
        outer = self.parts.outer
        self.index = self.valid = self.full = self.there = None
        self.memory = {}
        self.active = 0 < self.parts.tokens == patches_per_crop(outer.config)
        if self.active and hasattr(outer, "pack_image_features"):
            packed = packed_crops(outer, outer.config, inputs)
            self.active = all(span == 1 for image in packed for span in image.spans())
            if self.active:
                self.there = torch.stack([tokens >= 0 for image in packed for tokens in image.crops])

    def left(self) -> Tensor | None:
        """Which patches are left, bool [E, P]; None where they were not asked to leave."""
        if self.index is None:
            return None
        return mark(self.index, self.valid, self.full.shape[1])[:, self.parts.prefix :]

    def _observe(self, call: AttentionCall) -> None:
        self.call = call

    def _behind(self, place: int, block: nn.Module, args: tuple, output: Any) -> Any:
        """Behind a block: its output at its full length; perhaps the method chooses from it."""
        if not self.active:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        shorter = self.index is not None
        full = self._filled(hidden) if shorter else hidden
        self.full = full
        if place in self.blocks:
            self._choose(place, hidden)
        if not shorter:
            return None
        return (full, *output[1:]) if isinstance(output, tuple) else full

    def _choose(self, place: int, hidden: Tensor) -> None:
        """Ask the method, as at the projector, which patches of every crop are left."""
        prefix, device = self.parts.prefix, hidden.device
        batch, length = hidden.shape[:2]
        index = self.index
        if index is None:
            index = torch.arange(length, device=device).expand(batch, -1)
        everything = torch.ones(batch, length, dtype=torch.bool, device=device)
        valid = everything if self.valid is None else self.valid
        patch = index[:, prefix:] - prefix
        there = valid[:, prefix:]
        if self.there is not None:
            there = there & self.there.to(device).gather(1, patch.clamp_min(0))
        head = everything[:, :prefix]
        tower = TokenView(
            hidden,
            torch.cat([~head, valid[:, prefix:]], dim=1),
            prefix=prefix,
            depth=len(self.parts.blocks),
            has_cls=prefix > 0,
            attention=self.call.view(),
        )
        whole = self.there is None and self.valid is None
        view = TokenView(
            hidden[:, prefix:],
            there,
            whole=whole,
            real=there,
            position=patch,
            encoder=tower,
            pool=lambda x: x,
        )
        view.encoders = {place: tower}
        view.signals = {"remaining": lambda: sum(block > place for block in self.blocks)}
        counts = self._counts(batch, length - prefix if self.index is None else None)
        reduction = self.method.reduce(PROJECTOR, view, counts, self.memory)
        stays = mark(reduction.index, reduction.valid, there.shape[1]) | ~there
        kept, self.valid = keep_where(torch.cat([head, stays & valid[:, prefix:]], dim=1))
        self.index = index.gather(1, kept)

    def _counts(self, batch: int, tokens: int | None) -> int | Tensor:
        """How many of each crop's tokens are left in the end."""
        if tokens is not None:
            numbers = [tokens] * batch if self.there is None else self.there.sum(1).tolist()
            counts = [
                min(
                    [stage.count for stage in self.stages_of(number) if stage.site == PROJECTOR],
                    default=number,
                )
                for number in numbers
            ]
            self.counts = counts[0] if len(set(counts)) == 1 else torch.tensor(counts)
        return self.counts

    def _shorten(self, block: nn.Module, args: tuple, kwargs: Inputs) -> tuple[tuple, Inputs] | None:
        """Before a later block: what is left, and a mask where crops keep different numbers."""
        if self.index is None:
            return None
        given = dict(kwargs)
        if args:
            args = (gather_tokens(args[0], self.index), *args[1:])
        else:
            given["hidden_states"] = gather_tokens(given["hidden_states"], self.index)
        if self.valid is not None:
            mask = self.full.new_zeros(self.valid.shape)
            mask = mask.masked_fill(~self.valid, hidden_value(self.full.dtype))[:, None, None]
            args, given = (args[:1], given | {"attention_mask": mask})
        return args, given

    def _filled(self, short: Tensor) -> Tensor:
        """A block's output [E, K, C] at its full length, what has left with the value it left with."""
        index = self.index
        if self.valid is not None:
            index = torch.where(self.valid, index, self.full.shape[1])
        extra = torch.cat([self.full, self.full[:, :1]], dim=1)
        return extra.scatter(1, index.unsqueeze(2).expand_as(short), short)[:, :-1]
