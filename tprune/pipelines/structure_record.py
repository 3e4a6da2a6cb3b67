"""Edits of structure as tensors, in the record of a stage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import isnan, nan

import torch
from torch import Tensor

from tprune.core.weights import HALVES, Shared, StructureEdit

KEEP, BIAS, WEIGHT, SHARED, REMOVED = "keep/", "bias/", "weight/", "shared/", "removed"
WITHOUT = {half: f"without.{half}" for half in HALVES}


def record(edits: list[StructureEdit]) -> dict[str, Tensor]:
    """The edits as tensors."""
    tensors: dict[str, Tensor] = {}
    for edit in edits:
        for prefix, parts in _parts(edit).items():
            for kind, value in parts.items():
                tensors[f"{prefix}{edit.block}.{kind}"] = value.cpu()
        if edit.shared is not None:
            how = (
                edit.shared.base,
                edit.shared.rank,
                nan if edit.shared.scale is None else edit.shared.scale,
            )
            tensors[f"{SHARED}{edit.block}"] = torch.tensor(how, dtype=torch.float64)
    tensors[REMOVED] = _listed(edit.block for edit in edits if edit.removed)
    for half, name in WITHOUT.items():
        if any(half in edit.halves for edit in edits):
            tensors[name] = _listed(edit.block for edit in edits if half in edit.halves)
    return tensors


def _parts(edit: StructureEdit) -> dict[str, dict[str, Tensor]]:
    """The tensors of an edit by kind, by the prefix of their names in the record."""
    return {KEEP: edit.keep, BIAS: edit.bias, WEIGHT: edit.weight}


def _listed(blocks: Iterable[int]) -> Tensor:
    return torch.tensor(list(blocks), dtype=torch.int64)


def edits_of(tensors: dict[str, Tensor]) -> list[StructureEdit]:
    """What `record` stored."""
    found = {block: StructureEdit(block, removed=True) for block in tensors[REMOVED].tolist()}
    for half, name in WITHOUT.items():
        for block in tensors.get(name, _listed(())).tolist():
            edit = found.get(block, StructureEdit(block))
            found[block] = replace(edit, halves=(*edit.halves, half))
    for name, tensor in tensors.items():
        prefix, slash, place = name.partition("/")
        if prefix + slash == SHARED:
            base, rank, scale = tensor.tolist()
            how = Shared(int(base), int(rank), None if isnan(scale) else scale)
            found[int(place)] = StructureEdit(int(place), shared=how)
        elif slash:
            block, _, kind = place.partition(".")
            edit = found.setdefault(int(block), StructureEdit(int(block)))
            _parts(edit)[prefix + slash][kind] = tensor
    return [found[block] for block in sorted(found)]
