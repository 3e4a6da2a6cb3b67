"""Patches leave before a vision tower that sees all images as one sequence (Qwen2-VL and those after it).

The method chooses from their pixels, as it will at the projector; whole tokens leave. From the first block on the tower
works on what is left: rows, columns and windows are those of the whole image, windows without patches vanish. To
everything around the blocks they look as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from tprune.core.budget import PROJECTOR, Stage
from tprune.core.select import mark
from tprune.methods.tokens import TokenMethod
from tprune.models.encoder import Sight
from tprune.models.image_view import ImageViews
from tprune.models.layout import Unit
from tprune.models.run import Inputs
from tprune.models.vlm import Anatomy


class PatchSite:
    """Lets patches leave before the tower, until `remove`; a tower that sees images as a batch runs in full.

    Args:
        parts: of the model.
        method: what chooses, with `before_tower`.
        stages_of: where an image of so many tokens loses them, and how many are left in the end.
        views: makes the views.
    """

    def __init__(
        self,
        parts: Anatomy,
        method: TokenMethod,
        stages_of: Callable[[int], Sequence[Stage]],
        views: ImageViews,
    ):
        self.parts, self.method, self.stages_of, self.views = parts, method, stages_of, views
        # Which patches are left, as the tower orders them: int64 [K], and of how many before each place [P + 1].
        self.kept: Tensor | None = None
        self.before: Tensor | None = None
        self.full: Tensor | None = None
        # What blocks are given, by its id, and what they get in its place: most are given the same.
        self.fitted: dict[int, tuple[Any, Any]] = {}
        self.handles = []
        for block in parts.blocks:
            self.handles.append(block.register_forward_pre_hook(self._shorten, with_kwargs=True))
            # Outputs are full again before anybody else sees them.
            self.handles.append(block.register_forward_hook(self._behind, prepend=True))

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self._forget()

    def _forget(self) -> None:
        """Of the images before."""
        self.kept = self.before = self.full = None
        self.fitted = {}

    def left(self) -> None:
        """The images have gone through; what is left of them is chosen again at the projector."""
        self._forget()

    def begin(self, inputs: Inputs) -> None:
        """Images come; `inputs` of the call, by name."""
        self._forget()
        if inputs.get("image_grid_thw") is None:
            return
        sight = Sight(self.parts, inputs)
        stays = self._chosen(sight)
        if bool(stays.all()):
            return
        stays = stays.repeat_interleave(self.parts.merge**2)
        if sight.order is not None:
            stays = torch.zeros_like(stays).scatter(0, sight.order.to(stays.device), stays)
        self.kept = stays.nonzero().squeeze(1)
        self.before = torch.cat([stays.new_zeros(1, dtype=torch.int64), stays.cumsum(0)])

    def _chosen(self, sight: Sight) -> Tensor:
        """Which tokens are left, bool [tokens of all images], in the order of the pixels."""
        sizes = sight.inputs["image_grid_thw"].tolist()
        found: dict[int, Tensor] = {}
        for _, images in groupby(sorted(range(len(sizes)), key=sizes.__getitem__), key=sizes.__getitem__):
            alike = self._units(sight, list(images))
            number = len(alike[0].slot)
            view = self.views.of_pixels(sight, alike)
            stages = self.stages_of(number)
            count = min([stage.count for stage in stages if stage.site == PROJECTOR], default=number)
            reduction = self.method.reduce(PROJECTOR, view, count, {})
            stays = mark(reduction.index, reduction.valid, number)
            found |= {unit.image: own for unit, own in zip(alike, stays, strict=True)}
        return torch.cat([found[image] for image in range(len(sizes))])

    def _units(self, sight: Sight, images: list[int]) -> list[Unit]:
        """Images of one size, apart from any prompt."""
        place = torch.arange(sight.lengths[images[0]] // self.parts.merge**2)
        return [Unit(0, place, image, image, 1, place) for image in images]

    def _shorten(self, block: nn.Module, args: tuple, kwargs: Inputs) -> tuple[tuple, Inputs] | None:
        """Before a block: what is left, and the seams of its sequences."""
        if self.kept is None:
            return None
        given = dict(kwargs)
        self.full = args[0] if args else given["hidden_states"]
        short = self.full[self.kept.to(self.full.device)]
        if args:
            args = (short, *args[1:])
        else:
            given["hidden_states"] = short
        given["cu_seqlens"], longest = self._fit(given["cu_seqlens"], self._seams)
        if given.get("max_seqlen") is not None:
            given["max_seqlen"] = longest
        given["position_embeddings"] = self._fit(given["position_embeddings"], self._turns)
        return args, given

    def _fit(self, whole: Any, make: Callable[[Any], Any]) -> Any:
        """What `make` makes of what a block is given, once for all blocks that are given the same."""
        if id(whole) not in self.fitted:
            self.fitted[id(whole)] = whole, make(whole)
        return self.fitted[id(whole)][1]

    def _seams(self, whole: Tensor) -> tuple[Tensor, int]:
        """Where sequences begin and end among what is left, none of them empty, and the length of the longest."""
        seams = self.before.to(whole.device)[whole.long()].unique_consecutive().to(whole.dtype)
        return seams, int(seams.diff().max())

    def _turns(self, whole: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The rotary embeddings of what is left."""
        return tuple(part[self.kept.to(part.device)] for part in whole)

    def _behind(self, block: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Behind a block: its output at its full length, what has left as it was."""
        if self.kept is None:
            return None
        full, self.full = self.full, None
        return full.index_copy(0, self.kept.to(output.device), output)
