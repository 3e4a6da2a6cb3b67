"""Linear layers between two block-diagonal matrices: y = A (W (B x)) + b, with W in the layer's own place.

The layer stays the one that it was, W its weight; A and B are parameters beside it, `outward` and `inward`, and hooks
multiply by them. What looks at the layer's inputs afterwards sees those of W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tprune.core.factorise import blockwise
from tprune.errors import UserError
from tprune.models.blocks import Decoder, is_linear
from tprune.models.matrix import Matrix

NAMES = ("outward", "inward")


def wrap(matrix: Matrix, around: tuple[Tensor, Tensor]) -> None:
    """Put the blocks of A [R / b, b, b] and B [C / b, b, b] around a matrix; around a second time they are replaced.

    Raises:
        UserError: the matrix is a part of a fused projection or of stacked experts.
    """
    if matrix.module is None or matrix.rows is not None:
        raise UserError(
            f"{matrix.name} is a part of a fused or stacked matrix, which nothing can be put around; choose a method "
            "that only removes weights"
        )
    _put(matrix.module, around)


def _put(module: nn.Module, around: tuple[Tensor, ...]) -> None:
    """The parameters beside a layer's weight, in its dtype, and the hooks that read them."""
    fresh = not is_wrapped(module)
    for name, blocks in zip(NAMES, around, strict=True):
        module.register_parameter(name, nn.Parameter(blocks.to(module.weight), requires_grad=False))
    if fresh:
        module.register_forward_pre_hook(_before)
        module.register_forward_hook(_after)


def _before(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (blockwise(module.inward, arguments[0]), *arguments[1:])


def _after(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    if module.bias is None:
        return blockwise(module.outward, output)
    return blockwise(module.outward, output - module.bias) + module.bias


def is_wrapped(module: nn.Module) -> bool:
    """Whether a layer stands between two block-diagonal matrices."""
    return isinstance(getattr(module, "inward", None), nn.Parameter)


def sizes(decoder: Decoder) -> dict[str, list[list[int]]]:
    """The shapes of A's and B's blocks, by the wrapped layers' names in the list of blocks."""
    layers = ((name, module) for name, module in decoder.blocks.named_modules() if is_linear(module))
    return {
        name: [list(getattr(module, part).shape) for part in NAMES]
        for name, module in layers
        if is_wrapped(module)
    }


def write_config(decoder: Decoder) -> None:
    """Make the configuration say which layers are wrapped, so that a fresh model can be given room for them."""
    found = sizes(decoder)
    if found:
        decoder.config.tprune = getattr(decoder.config, "tprune", {}) | {"wrapped": found}


def make_room(decoder: Decoder, found: dict[str, Any]) -> None:
    """Give a freshly built model what `sizes` found, with values that do not matter."""
    for name, shapes in found.items():
        module = decoder.blocks.get_submodule(name)
        _put(module, tuple(torch.empty(shape, device=module.weight.device) for shape in shapes))
