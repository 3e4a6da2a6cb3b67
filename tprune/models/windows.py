"""Swin Transformers of timm and transformers: where their parts are, and tokens that leave between their windows.

Tokens leave in the longest stage alone, and all come back before it ends. In between, blocks run their own weights on
what is left, without windows, shift and bias by relative position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tprune.core.budget import Site
from tprune.errors import UserError
from tprune.methods.tokens import Shape
from tprune.models.anatomy import Anatomy, classes, halves
from tprune.models.relaxed import FitDriver
from tprune.models.vit import TokenDriver


def swin(model: nn.Module) -> Anatomy:
    """The parts of a Swin Transformer (the first version).

    Raises:
        UserError: a map that its windows do not tile.
    """
    stages = [
        list(module.blocks)
        for module in model.modules()
        if type(module).__name__ in ("SwinTransformerStage", "SwinStage")
    ]
    blocks = [block for stage in stages for block in stage]
    longest = max(reversed(range(len(stages))), key=lambda place: len(stages[place]))
    first = sum(len(stage) for stage in stages[:longest])
    inner = stages[longest][0]
    grid = tuple(inner.input_resolution)
    window = inner.window_size if isinstance(inner.window_size, int) else inner.window_size[0]
    window = min(window, *grid)
    if grid[0] % window or grid[1] % window:
        raise UserError(
            f"windows of {window} x {window} do not tile the {grid[0]} x {grid[1]} map of this {type(model).__name__}"
        )
    attentions = [block.attn if hasattr(block, "attn") else block.attention for block in blocks]
    attention = attentions[first]
    embeddings = getattr(model, "patch_embed", None)
    if embeddings is None:
        embeddings = next(part for name, part in model.named_modules() if name.endswith("embeddings"))
    shape = Shape(
        depth=len(blocks),
        tokens=grid[0] * grid[1],
        heads=getattr(attention, "num_heads", None) or attention.num_attention_heads,
        grid=grid,
        width=_norm(inner).normalized_shape[0],
        classes=classes(model),
        kind="windows",
        window=window,
        span=(first, first + len(stages[longest])),
        lengths=tuple(block.input_resolution[0] * block.input_resolution[1] for block in blocks),
    )
    return Anatomy(embeddings, blocks, attentions, shape, model)


def _norm(block: nn.Module) -> nn.LayerNorm:
    return next(module for module in block.modules() if isinstance(module, nn.LayerNorm))


class Windows:
    """Puts a driver into the blocks of a Swin that tokens leave or come back to."""

    def _attach(self) -> None:
        self._hook(self.parts.entrance.register_forward_pre_hook(self._begin, with_kwargs=True))
        for layer, block in enumerate(self.parts.blocks):
            if Site(layer) in self.counts:
                inner = self._seeing(*halves(block))
                self._replace(block, self._mapped(layer, inner, hasattr(block, "attention")))
                self._fuse(self.parts.attentions[layer])

    def _fuse(self, attention: nn.Module) -> None:
        """timm's Swin runs fused attention only where it is told to; the groups of a sight need it."""
        if hasattr(attention, "fused_attn"):
            self.undo.callback(setattr, attention, "fused_attn", attention.fused_attn)
            attention.fused_attn = True

    def _mapped(self, layer: int, seeing: Callable, paired: bool) -> Callable:
        """A block's forward: tokens in a row inside, the map that the others expect where all are there.

        `paired` is whether it gives its attention map, here None, beside its output, as transformers' blocks do.
        """
        shape = self.parts.shape

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            x = hidden_states.flatten(1, 2) if hidden_states.dim() == 4 else hidden_states
            if self.position is None and x.shape[1] != shape.tokens:
                raise UserError(
                    f"the model was given {x.shape[1]} tokens, its stages were planned for {shape.tokens}; "
                    "use images of the size it was built for"
                )
            x = self._reduce(Site(layer), x)
            self.trace.entering.append(self._entering(x))
            x = seeing(x)
            if paired:
                return x, None
            return x.unflatten(1, shape.grid) if x.shape[1] == shape.tokens else x

        return forward


class WindowDriver(Windows, TokenDriver):
    """Runs a token method inside a Swin Transformer until removed."""


class WindowFitDriver(Windows, FitDriver):
    """Runs a method's `Fit` inside a Swin Transformer until removed."""
