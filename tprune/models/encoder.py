"""What a vision tower saw of its images: its blocks' attention and outputs, and what went into the projector.

Towers see crops as a batch, or all images as one sequence (Qwen2-VL, Pixtral), some of them in windows. Whatever it
is, a view has one image or crop per row and its patches in the order in which they become image tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tprune.errors import UserError
from tprune.methods.attention import Attention
from tprune.methods.token_view import TokenView
from tprune.models.layout import members, packed_crops, pair, pools
from tprune.models.run import Inputs
from tprune.models.signals import attention_of
from tprune.models.taps import AttentionCall, Tap
from tprune.models.vlm import Anatomy


@dataclass(eq=False)
class Sight:
    """One call of the model's `get_image_features`: what went in, and what was seen on the way.

    Attributes:
        parts: of the model.
        inputs: of the call, by name.
        calls: per block of the tower, its attention; several where it ran in pieces.
        outputs: per block, the residual stream behind it, [crops, prefix + P, C] or [P, C].
        projecting: what the projector was given, or None where nobody asked.
        left: bool [crops, P], the patches that are left where some left inside the tower; None elsewhere.
        converted: the projector's weights in other dtypes.
    """

    parts: Anatomy
    inputs: Inputs
    calls: dict[int, list[AttentionCall]] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    projecting: Tensor | None = None
    left: Tensor | None = None
    converted: dict[torch.dtype, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def block(self, index: int, crops: Sequence[int]) -> TokenView:
        """The patches of some crops behind a block, and its attention; images are crops where the tower has none."""
        attention, prefix = self.attention(index, crops), self.parts.prefix
        hidden = self.split(self.outputs[index], crops)
        prunable = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        prunable[:, :prefix] = False
        return TokenView(
            hidden,
            prunable,
            prefix=prefix,
            depth=len(self.parts.blocks),
            has_cls=prefix > 0,
            attention=attention,
        )

    def attention(self, index: int, crops: Sequence[int]) -> Attention:
        """The attention of a block over each of these crops; patches of different windows do not see each other."""
        calls = self.calls[index]
        query, key, value = (
            self.split(torch.cat([getattr(call, name) for call in calls], dim=2), crops, dim=2)
            for name in ("query", "key", "value")
        )
        bias = None
        if self.lengths is not None and len(calls) > len(self.lengths):
            sizes = torch.tensor([call.query.shape[2] for call in calls])
            window = torch.arange(len(calls)).repeat_interleave(sizes).to(query.device)
            window = self.split(window[None], crops)
            bias = (window.unsqueeze(2) == window.unsqueeze(1)).unsqueeze(1)
        return Attention(query, key, value, calls[0].scale, bias=bias)

    def split(self, x: Tensor, crops: Sequence[int], dim: int = 1) -> Tensor:
        """What belongs to these crops, all of one size: `x` has crops in front, or all of them along `dim`."""
        if self.lengths is None:
            return x if list(crops) == list(range(len(x))) else x[torch.tensor(crops, device=x.device)]
        if x.dim() == 2 and dim == 1 and x.shape[0] != 1:
            x = x.unsqueeze(0)
        if self.order is not None:
            x = x.index_select(dim, self.order.to(x.device))
        parts = x.split(self.lengths, dim=dim)
        return torch.cat([parts[crop] for crop in crops])

    @cached_property
    def lengths(self) -> list[int] | None:
        """Patches of every image where the tower sees all of them as one sequence; None where it sees a batch."""
        grid, sizes = self.inputs.get("image_grid_thw"), self.inputs.get("image_sizes")
        if grid is not None:
            return grid.prod(-1).tolist()
        if sizes is not None and not hasattr(self.parts.outer, "pack_image_features"):
            return (torch.as_tensor(sizes) // self.parts.outer.vision_tower.patch_size).prod(-1).tolist()
        return None

    @cached_property
    def order(self) -> Tensor | None:
        """Where the tower has every patch, in the order of the pixels, if it sorts them into windows."""
        tower = self.parts.tower
        make = getattr(sys.modules[type(tower).__module__], "get_vision_window_index", None)
        if make is None or not hasattr(tower, "window_size"):
            return None
        merge = tower.spatial_merge_size
        index, _ = make(
            self.inputs["image_grid_thw"],
            spatial_merge_size=merge,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        group = torch.arange(merge**2, device=index.device)
        return (index.argsort().unsqueeze(1) * merge**2 + group).flatten()

    def features(self, crops: Sequence[int]) -> Tensor:
        """What the projector makes a token of, [crops, tokens, C]."""
        if self.lengths is None:
            x = self.split(self.projecting, crops)
            if pools(self.parts.projector):
                x = x[:, members(self.parts.outer, self.parts.outer.config, x.shape[1]).to(x.device)].mean(2)
            return x
        x = self.projecting if self.projecting.dim() == 3 else self.projecting.unsqueeze(0)
        return self.split(x, crops).unflatten(1, (-1, self.parts.merge**2)).flatten(2)

    def project(self, features: Tensor) -> Tensor:
        """The projector on what `features` gave or a mixture of it: [..., C] -> [..., D], in the dtype given."""
        rows = features
        if self.lengths is not None:
            rows = features.reshape(-1, features.shape[-1] // self.parts.merge**2)
        projector = self.parts.projector
        if pools(projector):
            # The mean is taken: what is left of it takes any number of tokens.
            return projector.mm_soft_emb_norm(rows) @ projector.mm_input_projection_weight.to(rows.dtype)
        if next(projector.parameters()).dtype == features.dtype:
            found = projector(rows)
        else:
            found = torch.func.functional_call(projector, self._weights(features.dtype), (rows,))
        return found.view(*features.shape[:-1], -1)

    def _weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The projector's weights in another dtype."""
        if dtype not in self.converted:
            self.converted[dtype] = {
                name: weight.to(dtype) for name, weight in self.parts.projector.named_parameters()
            }
        return self.converted[dtype]

    def pixels(self, crops: Sequence[int]) -> Tensor:
        """The pixels of every patch of some crops as the tower sees them: float32 [crops, P, channels, n]."""
        pixels = self.inputs["pixel_values"].float()
        if self.lengths is not None and pixels.dim() == 2:
            channels = self.parts.tower.config.in_channels
            merged = torch.cat([pixels.split(self.lengths)[crop][None] for crop in crops])
            return merged.unflatten(2, (channels, -1))
        pixels = pixels.flatten(0, 1)[self._given()] if pixels.dim() == 5 else pixels
        rows, columns = pair(self.parts.patch)
        chosen = pixels[torch.tensor(crops, device=pixels.device)]
        grid = chosen.unfold(2, rows, rows).unfold(3, columns, columns)
        return grid.permute(0, 2, 3, 1, 4, 5).flatten(4).flatten(1, 2)

    def patches(self, crops: Sequence[int], normalisation: tuple[Any, Any] | None) -> Tensor:
        """`pixels` brought back to 0 .. 1: float32 [crops, P, channels, n].

        Args:
            crops: which.
            normalisation: mean and deviation per channel; without them a crop's darkest value is 0, its brightest 1.
        """
        patches = self.pixels(crops)
        if normalisation is None:
            low, high = patches.amin((1, 2, 3), keepdim=True), patches.amax((1, 2, 3), keepdim=True)
            return (patches - low) / (high - low).clamp_min(1e-8)
        mean, deviation = (torch.as_tensor(part).to(patches)[:, None] for part in normalisation)
        return (patches * deviation + mean).clamp(0, 1)

    def _given(self) -> Tensor:
        """Which of the stacked crops [images · most crops] are real."""
        pixels = self.inputs["pixel_values"]
        packed = packed_crops(self.parts.outer, self.parts.outer.config, self.inputs)
        counts = torch.tensor([image.cut for image in packed])
        return (torch.arange(pixels.shape[1]) < counts.unsqueeze(1)).flatten().to(pixels.device)


class Watch:
    """Keeps what the latest call of a vision tower showed, until `remove`.

    Args:
        parts: of the model.
        blocks: whose attention and output are kept.
        projector: whether the projector's input is kept.

    Raises:
        UserError: the tower has no blocks that can be watched.
    """

    def __init__(self, parts: Anatomy, blocks: Sequence[int], projector: bool):
        if blocks and not parts.blocks:
            raise UserError(f"{type(parts.tower).__name__} has no blocks whose attention can be watched")
        self.parts, self.place, self.handles, self.tap = parts, {}, [], None
        self.clear()
        for index in blocks:
            block = parts.blocks[index]
            self.place[attention_of(block)] = index
            self.handles.append(block.register_forward_hook(self._behind(index)))
        if blocks:
            self.tap = Tap(self.place, self._observe)
        if projector:
            self.handles.append(parts.projector.register_forward_pre_hook(self._before_projector))

    def take(self, inputs: Inputs) -> Sight:
        """What was seen since the last time."""
        sight = Sight(self.parts, inputs, self.calls, self.outputs, self.projecting)
        self.clear()
        return sight

    def clear(self) -> None:
        """Forget everything."""
        self.calls: dict[int, list[AttentionCall]] = {}
        self.outputs: dict[int, Tensor] = {}
        self.projecting: Tensor | None = None

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self.handles:
            handle.remove()
        if self.tap is not None:
            self.tap.remove()
        self.handles, self.tap = [], None
        self.clear()

    def _observe(self, call: AttentionCall) -> None:
        self.calls.setdefault(self.place[call.module], []).append(call)

    def _behind(self, index: int) -> Any:
        def hook(block: nn.Module, args: tuple, output: Any) -> None:
            self.outputs[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def _before_projector(self, projector: nn.Module, args: tuple) -> None:
        self.projecting = args[0]
