"""Patches leave inside a vision tower, before they are projected.

Behind one block of the tower the method chooses as it will at the projector; from there on the blocks work on what is
left. To everything around them they look as if nothing had happened: their outputs have their full length, and patches
that left keep the value they left with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tprune.core.budget import PROJECTOR, Stage
from tprune.core.reduction import gather_tokens
from tprune.core.select import keep_where
from tprune.methods.base import TokenMethod
from tprune.methods.views import TokenView
from tprune.models.layout import packed_crops
from tprune.models.run import Inputs
from tprune.models.signals import attention_of
from tprune.models.taps import AttentionCall, Tap
from tprune.models.track import hidden_value
from tprune.models.vlm import Anatomy


class TowerSite:
    """Lets patches leave behind a block of a tower that makes one image token of each, until `remove`.

    Other towers (which merge patches, or see all images as one sequence) run in full, and so does one whose crops'
    mosaic is resized: what leaves, leaves at the projector.

    Args:
        parts: of the model.
        block: behind which patches leave; the method reads its attention (`TokenMethod.encoder_blocks`).
        method: what chooses.
        stages_of: where a crop of so many tokens loses them, and how many are left.
    """

    def __init__(
        self, parts: Anatomy, block: int, method: TokenMethod, stages_of: Callable[[int], Sequence[Stage]]
    ):
        self.parts, self.block, self.method, self.stages_of = parts, block, method, stages_of
        self.active, self.there = False, None
        # What is left of every crop [E, K], which of it is real (None: all), and all of it with its latest values.
        self.index: Tensor | None = None
        self.valid: Tensor | None = None
        self.full: Tensor | None = None
        self.tap = Tap([attention_of(parts.blocks[block])], self._observe)
        # Their outputs are full again before anybody else sees them.
        self.handles = [parts.blocks[block].register_forward_hook(self._choose, prepend=True)]
        for later in parts.blocks[block + 1 :]:
            self.handles.append(later.register_forward_pre_hook(self._shorten, with_kwargs=True))
            self.handles.append(later.register_forward_hook(self._fill, prepend=True))

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self.handles:
            handle.remove()
        self.tap.remove()
        self.handles, self.index, self.valid, self.full, self.there = [], None, None, None, None

    def begin(self, inputs: Inputs) -> None:
        """Images come; `inputs` of the call, by name."""
        outer = self.parts.outer
        self.index = self.there = None
        self.active = bool(self.parts.tokens) and not hasattr(outer, "pixel_shuffle")
        if self.active and hasattr(outer, "pack_image_features"):
            packed = packed_crops(outer, outer.config, inputs)
            self.active = all(span == 1 for image in packed for span in image.spans())
            if self.active:
                self.there = torch.stack([tokens >= 0 for image in packed for tokens in image.crops])

    def _observe(self, call: AttentionCall) -> None:
        self.call = call

    def _choose(self, block: nn.Module, args: tuple, output: Any) -> None:
        """Ask the method, as at the projector, which patches of every crop are left."""
        if not self.active:
            return
        hidden, prefix = output[0] if isinstance(output, tuple) else output, self.parts.prefix
        patches = hidden[:, prefix:]
        everything = torch.ones(patches.shape[:2], dtype=torch.bool, device=hidden.device)
        there = everything if self.there is None else self.there.to(hidden.device)
        head = everything.new_zeros(len(hidden), prefix)
        tower = TokenView(
            hidden,
            torch.cat([head, everything], dim=1),
            prefix=prefix,
            depth=len(self.parts.blocks),
            has_cls=prefix > 0,
            attention=self.call.view(),
        )
        view = TokenView(
            patches, there, whole=self.there is None, real=there, encoder=tower, pool=lambda x: x
        )
        view.encoders = {self.block: tower}
        counts = [self._count(number) for number in there.sum(1).tolist()]
        left = counts[0] if len(set(counts)) == 1 else torch.tensor(counts)
        reduction = self.method.reduce(PROJECTOR, view, left, {})
        stays = ~there
        real = torch.ones_like(reduction.index, dtype=torch.bool)
        real = real if reduction.valid is None else reduction.valid
        stays = torch.cat([stays, head.new_zeros(len(stays), 1)], dim=1)
        stays = stays.scatter(1, torch.where(real, reduction.index, patches.shape[1]), True)[:, :-1]
        self.index, self.valid = keep_where(torch.cat([~head, stays], dim=1))
        self.full = hidden

    def _count(self, tokens: int) -> int:
        """How many of a crop's tokens are left."""
        return min(
            [stage.count for stage in self.stages_of(tokens) if stage.site == PROJECTOR], default=tokens
        )

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

    def _fill(self, block: nn.Module, args: tuple, output: Any) -> Any:
        """Behind a later block: its output at its full length."""
        if self.index is None:
            return output
        short = output[0] if isinstance(output, tuple) else output
        index = self.index
        if self.valid is not None:
            index = torch.where(self.valid, index, self.full.shape[1])
        extra = torch.cat([self.full, self.full[:, :1]], dim=1)
        self.full = extra.scatter(1, index.unsqueeze(2).expand_as(short), short)[:, :-1]
        return (self.full, *output[1:]) if isinstance(output, tuple) else self.full
