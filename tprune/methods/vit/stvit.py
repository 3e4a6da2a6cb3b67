"""STViT goes on with a few semantic tokens: pooled image tokens that two blocks let attend to the image.

In a plain transformer they replace the image tokens for good, in a Swin they work inside each window for four blocks
of every six, and the image tokens then come back and attend to them (STViT-R). Every block keeps its own weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, ClassVar

import torch

from tprune.core import grid as tiling
from tprune.core.budget import Site, Stage, mean_entering, scale_layer
from tprune.core.reduction import Reduction, Sight
from tprune.core.select import with_prefix
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod
from tprune.methods.vit._stvit_fit import Semantics
from tprune.methods.vit._stvit_places import laid_out, resized, sizes, unmoved

DEPTH, SIDE, WINDOW, PERIOD = 12, 14, 7, 6
"""The paper's model, its rows of patches; a Swin's window, and the blocks from one return of the image to the next."""


@dataclass(frozen=True)
class STViT(TokenMethod):
    """Semantic tokens by pooling and cross-attention, and in a Swin their recovery."""

    paper = Paper(
        title="Making Vision Transformers Efficient from A Token Sparsification View",
        venue="CVPR",
        year=2023,
        arxiv="2303.08685",
        code="changsn/STViT-R",
        checked="code",
        notes="The authors' public code is STViT-R for Swin-S and B, trained from scratch with layer scale, another "
        "patch embedding and no residual around the first semantic attention; here a trained model's own blocks, "
        "without their bias by relative position, do the work and learn on. For plain models the paper alone was at "
        "hand, read as the same modules with the whole image as one window; class and register tokens stay as they "
        "are. Where semantic tokens are made, queries and outputs are projected for the image tokens too, and "
        "thrown away.",
    )
    kind = "trained"
    needs_image = True
    reads = ()
    native = ("cells", "window_cells")
    learns = "required"
    runs_on = ("plain", "windows")
    sees = True
    built_in: ClassVar[dict[str, Any]] = {"epochs": 2.0, "batch": 16, "lr": 3e-4}

    layer: int = param(4, "block, of 12, that makes semantic tokens (plain models)", low=0)
    cells: int = param(4, "semantic tokens along a side of the image, of 14 patches (plain models)", low=1)
    window_cells: int = param(3, "semantic tokens along a side of a window of 7 (Swin)", low=1)
    reach: int = param(3, "image tokens around a window that its semantic tokens see too (Swin)", low=0)
    pool: str = param("max", "how semantic tokens begin", choices=("max", "mean"))
    centres: bool = param(True, "learn a global centre for every semantic token, added in the second block")
    residual: bool = param(True, "keep what was pooled beside what the first block reads")
    epochs: float = param(300.0, "of a fit", low=0)
    batch: int = param(1024, "images per step of a fit", low=1)
    lr: float = param(1e-3, "of a fit, at its peak", low=1e-12)
    min_lr: float = param(1e-5, "of a fit, at its end", low=0)
    warmup: float = param(0.0667, "fraction of the steps", low=0, high=1)
    smoothing: float = param(0.1, "of the labels in a fit", low=0, high=1)
    weight_decay: float = param(0.05, "of matrices in a fit", low=0)

    def check(self, shape):
        """There are blocks enough."""
        super().check(shape)
        least = PERIOD if shape.kind == "windows" else 2
        if blocks(shape) < least:
            raise UserError(f"stvit needs {least} blocks of one kind, and this model has {blocks(shape)}")

    def size(self, shape, knob):
        """Rows and columns of semantic tokens of an image, or of a window."""
        if shape.kind == "windows":
            side = self.window_cells * shape.window / WINDOW if knob is None else knob * shape.window
            side = max(1, min(round(side), shape.window))
            return side, side
        if knob is None:
            sides = [max(1, min(round(self.cells * side / SIDE), side)) for side in shape.grid]
            return sizes(shape.grid)[sum(sides) - 2]
        return sizes(shape.grid)[round(knob * (sum(shape.grid) - 2))]

    def stages(self, shape, knob):
        """Semantic tokens from where they are made on; in a Swin all image tokens again at every sixth block.

        So many that they would cost more than they save are none.
        """
        rows, columns = self.size(shape, knob)
        windows = shape.tokens // shape.window**2 if shape.window else 1
        count = rows * columns * windows
        stages = self.periods(shape, count) if shape.window else self.once(shape, count)
        return stages if mean_entering(stages, shape.tokens, shape.depth) < 1 else []

    def once(self, shape, count):
        """Two blocks make `count` semantic tokens, for good."""
        first = min(scale_layer(self.layer, DEPTH, shape.depth), shape.depth - 2)
        return [Stage(Site(first + step), count, seen=count + shape.tokens) for step in (0, 1)]

    def periods(self, shape, count):
        """Of six blocks one is as it was, two make semantic tokens, two work on them, and one brings the image back."""
        stages, tokens = [], shape.tokens
        for first in range(shape.span[0], shape.span[1] - PERIOD + 1, PERIOD):
            stages += [Stage(Site(first + step), count, seen=count + tokens) for step in (1, 2)]
            stages += [Stage(Site(first + step), count) for step in (3, 4)]
            stages.append(Stage(Site(first + 5), tokens))
        return stages

    def reduce(self, site, view, count, memory):
        """With the centres that were learned."""
        return self.step(view, count, memory, self.state.get("centres"))

    def step(self, view, count, memory, centres):
        """What comes next: making semantic tokens, refining them, letting them work, and recovery."""
        steps = (self.make, self.refine, self.within_windows, self.among_all, self.recover)
        step = memory.get("step", 0)
        memory["step"] = (step + 1) % len(steps)
        return steps[step](view, count, memory, centres)

    def make(self, view, count, memory, centres):
        """Pool the image; its cells then see the image, in a Swin what is around their window, and themselves."""
        image = view.hidden[:, view.prefix :]
        if image.shape[1] != view.grid[0] * view.grid[1]:
            raise UserError(f"stvit was given {image.shape[1]} tokens and planned for a map of {view.grid}")
        window, cells = self.layout(view.grid, view.window, count)
        places = laid_out(view.grid, window, cells, self.reach, image.device)
        memory |= {"image": image, "places": places, "period": memory.get("period", -1) + 1}
        pooled = tiling.pool_cells(image, view.grid, window, cells, self.pool)
        sight = self.sight(view, memory, pooled, adds=self.residual)
        if view.window:
            sight = replace(sight, queries=places.own, keys=torch.cat([places.own, places.around + count], 1))
        index, source, into = (
            with_prefix(places.middle, view.prefix),
            places.rest + view.prefix,
            places.owner[places.rest] + view.prefix,
        )
        index, source, into = (one.expand(len(image), -1) for one in (index, source, into))
        made = torch.cat([view.hidden[:, : view.prefix], pooled], 1)
        return Reduction(index, view.hidden.shape[1], source, into, made=made, sight=sight)

    def refine(self, view, count, memory, centres):
        """Add the centres, once; semantic tokens see the image, and themselves without centres."""
        semantic, made = view.hidden[:, view.prefix :], view.hidden
        if centres is not None and memory["period"] == 0:
            own = resized(centres, memory["places"].grid).to(made.dtype)
            made = torch.cat([made[:, : view.prefix], semantic + own], 1)
        return unmoved(view.hidden, made, self.sight(view, memory, semantic))

    def within_windows(self, view, count, memory, centres):
        """Those of a window see each other."""
        own = memory["places"].own
        return unmoved(view.hidden, view.hidden, Sight(queries=own, keys=own))

    def among_all(self, view, count, memory, centres):
        """All see each other."""
        return unmoved(view.hidden, view.hidden, Sight())

    def recover(self, view, count, memory, centres):
        """The image tokens come back and see the semantic ones."""
        index = memory["places"].owner.expand(len(view.hidden), -1)
        return Reduction(index, view.hidden.shape[1], made=memory["image"], sight=Sight(tokens=view.hidden))

    def sight(self, view, memory, semantic, adds=True):
        """`semantic` [B, K, D] and the image are seen."""
        tokens, places = torch.cat([semantic, memory["image"]], 1), memory["places"]
        position = torch.cat([places.middle, torch.arange(len(places.owner), device=tokens.device)])
        return Sight(tokens, (position + view.prefix).expand(len(tokens), -1), adds=adds)

    def layout(self, grid, window, count):
        """The window that is pooled (0: the whole grid) and its cells, of `count` cells in all."""
        if window:
            side = isqrt(count * window**2 // (grid[0] * grid[1]))
            return (window, window), (side, side)
        return grid, next(size for size in sizes(grid) if size[0] * size[1] == count)

    def map(self, grid, window, count):
        """Rows and columns of all cells."""
        window, cells = self.layout(grid, window, count)
        return tuple(side // one * cell for side, one, cell in zip(grid, window, cells, strict=True))

    def fit(self, shape, keep, seed):
        """The model itself and the centres learn, at the budget's number of semantic tokens."""
        return Semantics(self, shape, keep, seed)


def blocks(shape):
    """How many blocks tokens may leave."""
    return shape.depth if shape.span is None else shape.span[1] - shape.span[0]
