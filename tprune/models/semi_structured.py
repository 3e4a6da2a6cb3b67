"""Linear layers pruned 2:4 in torch's semi-structured form, which sparse tensor cores run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tprune.models.find import find_blocks

MULTIPLES = (32, 64)
"""What the (outputs, inputs) of a layer must be multiples of, in float16 and bfloat16."""


def convert(model: nn.Module) -> dict[str, int]:
    """Put what is 2:4 of the weights in a decoder's blocks into semi-structured form, where its size fits; in place.

    The tensors themselves stay as they are, for whoever else holds them.

    Returns:
        How many layers are `converted`, and how many `left`.
    """
    decoder = find_blocks(model)
    counts = {"converted": 0, "left": 0}
    for index in range(len(decoder.blocks)):
        for module in decoder.inputs(index).values():
            if type(module) is nn.Linear and fits(module.weight):
                sparse = torch.sparse.to_sparse_semi_structured(module.weight.detach())
                module.weight = nn.Parameter(sparse, requires_grad=False)
                counts["converted"] += 1
            else:
                counts["left"] += 1
    return counts


def fits(weight: Tensor) -> bool:
    """Whether a weight [out, in] has the form: sizes that the kernels take, and two of every four inputs zero."""
    whole = all(size % multiple == 0 for size, multiple in zip(weight.shape, MULTIPLES, strict=True))
    return whole and bool((weight.unflatten(1, (-1, 4)).count_nonzero(2) <= 2).all())
