"""Edits of matrices on disk: packed masks, and the parameters that changed.

One format serves three times: as the journal of finished blocks, in an artifact by reference, and as the masks
beside a masked model. `mask/NAME` holds the mask of the matrix NAME, a bit per weight; `weight/NAME` the new
values of the parameter NAME where surviving weights changed; `outward/NAME` and `inward/NAME` what stands around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from tprune.core.mask import count_true
from tprune.core.weights import WeightEdit, pack_bits, unpack_bits
from tprune.errors import UserError
from tprune.models import factored
from tprune.models.find import find_blocks
from tprune.models.matrix import Matrix

MASK, WEIGHT = "mask/", "weight/"


def apply(matrix: Matrix, edit: WeightEdit) -> None:
    """Carry out an edit in the model."""
    if edit.weight is not None:
        matrix.write(edit.weight)
    matrix.remove(edit.mask)
    if edit.around is not None:
        factored.wrap(matrix, edit.around)


def record(matrices: Iterable[tuple[Matrix, WeightEdit]]) -> dict[str, Tensor]:
    """The edits of these matrices, each carried out when it comes, as tensors on the CPU."""
    tensors, changed = {}, {}
    for matrix, edit in matrices:
        tensors[MASK + matrix.name] = pack_bits(edit.mask)
        if edit.weight is not None:
            changed[WEIGHT + matrix.parameter_name] = matrix.parameter
        if edit.around is not None:
            tensors |= {
                f"{part}/{matrix.name}": blocks.cpu()
                for part, blocks in zip(factored.NAMES, edit.around, strict=True)
            }
        del edit  # before the next one is made
    return tensors | {name: parameter.data.cpu() for name, parameter in changed.items()}


def replay(matrices: Iterable[Matrix], tensors: dict[str, Tensor]) -> None:
    """Carry out recorded edits; doing it twice changes nothing.

    Raises:
        UserError: the record is of another model.
    """
    written: set[str] = set()
    for matrix in matrices:
        weight, mask = tensors.get(WEIGHT + matrix.parameter_name), tensors.get(MASK + matrix.name)
        if mask is None and weight is None:
            continue
        size = (matrix.shape[0] * matrix.shape[1] + 7) // 8
        if (mask is not None and len(mask) != size) or (
            weight is not None and weight.shape != matrix.parameter.shape
        ):
            raise UserError(f"the stored edit of {matrix.name} does not fit this model; it is of another one")
        if weight is not None and matrix.parameter_name not in written:
            matrix.parameter.data.copy_(weight)
            written.add(matrix.parameter_name)
        if mask is not None:
            matrix.remove(unpack_bits(mask, matrix.shape).to(matrix.parameter.device))
        around = [tensors.get(f"{part}/{matrix.name}") for part in factored.NAMES]
        if None not in around:
            factored.wrap(matrix, around)


def removed(tensors: dict[str, Tensor], matrix: Matrix) -> int:
    """How many weights of `matrix` a record removes."""
    mask = tensors.get(MASK + matrix.name)
    return 0 if mask is None else count_true(unpack_bits(mask, matrix.shape))


def only_masks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A record without the changed parameters, for beside a model that holds them."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(MASK)}


def matched(model: nn.Module, masks: Mapping[str, Tensor]) -> list[tuple[Matrix, Tensor]]:
    """The matrices of `model` that packed `masks` are of, by name, each with what is pruned of it, bool [out, in].

    Raises:
        UserError: the masks are of another model, or its weights are not whole in this process.
    """
    decoder = find_blocks(model)
    blocks = range(len(decoder.blocks))
    matrices = {matrix.name: matrix for index in blocks for matrix in decoder.matrices(index)}
    held = []
    for name, packed in masks.items():
        matrix = matrices.get(name)
        if matrix is None or (matrix.shape[0] * matrix.shape[1] + 7) // 8 != len(packed):
            raise UserError(
                f"the mask of {name} does not fit this model; train the model that it belongs to, unsharded"
            )
        held.append((matrix, unpack_bits(packed, matrix.shape).to(matrix.parameter.device)))
    return held


def zeros(model: nn.Module) -> list[tuple[Matrix, Tensor]]:
    """The matrices of `model` that have zeros, whoever put them there, each with where they are, bool [out, in]."""
    decoder = find_blocks(model)
    matrices = (matrix for index in range(len(decoder.blocks)) for matrix in decoder.matrices(index))
    found = ((matrix, matrix.read() == 0) for matrix in matrices)
    return [(matrix, mask) for matrix, mask in found if count_true(mask)]


@torch.no_grad()
def remove(held: Iterable[tuple[Matrix, Tensor]]) -> None:
    """Set what masks mark to zero."""
    for matrix, mask in held:
        matrix.remove(mask)


def kept(held: Iterable[tuple[Matrix, Tensor]]) -> dict[str, Tensor]:
    """What masks leave of every parameter that they are of: bool, of its shape, by its name."""
    found: dict[str, Tensor] = {}
    for matrix, mask in held:
        whole = torch.ones_like(matrix.parameter, dtype=torch.bool)
        matrix.remove(mask, found.setdefault(matrix.parameter_name, whole))
    return found


def masks_of(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The packed masks among stored tensors (of several stages, too), by the name of the matrix.

    Raises:
        UserError: there are none.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stage, mark, matrix = name.rpartition(MASK)
        if mark and (not stage or stage.rstrip(".").isdigit()):
            found[matrix] = found[matrix] | tensor if matrix in found else tensor
    if not found:
        raise UserError(
            f"{where} has no masks: none are stored with --loadable plain, and methods that remove structure have none"
        )
    return found
