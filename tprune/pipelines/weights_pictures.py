"""What was removed from a model's weights, read from an edit in memory or from an output folder, without the model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tprune import artifact
from tprune.errors import UserError
from tprune.evaluate.heat_map import Sparsity, weight_pictures
from tprune.evaluate.pictures import Picture
from tprune.models.blocks import ROUTERS
from tprune.models.masks import MASK
from tprune.recipe import Recipe, Stage

Counts = Iterable[tuple[str, int, int]]
"""Per matrix its name, how many weights are gone, and how many there were."""

IN_BLOCK = re.compile(r"^(.*?\.)?(\d+)\.(.+)$")
UNITS = re.compile(r"^(\d+) of (\d+)$")
ORDER = ("qkv", "q", "query", "k", "key", "v", "value", "o", "out", "gate_up", "gate", "up", "down")
"""Modules in the order in which data goes through them, without `_proj`."""
BITS = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.int16)


def of_handle(title: str, rows: list[dict[str, Any]], tensors: dict[str, Tensor]) -> list[Picture]:
    """The pictures of an edit that was just made: its report's rows, and its edits as tensors."""
    masks = [name for name in tensors if name.startswith(MASK)]
    found = of_counts(packed(masks, MASK, tensors.__getitem__)) if masks else of_rows(rows)
    return weight_pictures(found, title)


def of_folder(folder: Path, report: dict[str, Any], recipe: Recipe) -> list[Picture]:
    """The pictures of the pruned weights in an output folder, in two formats; tensors are read one by one.

    Masks are counted where there are any. Structure that was removed is in the report; else zeros are counted.

    Raises:
        UserError: a file that cannot be read.
    """
    drawn: list[Picture] = []
    several = len(recipe.stages) > 1
    for place, stage in enumerate(recipe.stages):
        if stage.family != "llm-weights":
            continue
        last = place == len(recipe.stages) - 1
        try:
            found = _sparsity(folder, report["per_layer"] if last else [], f"{place}." if several else "")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder}: its weights cannot be read ({error}); run its recipe again") from None
        if found is not None:
            prefix = f"stage-{place + 1}-" if several else ""
            drawn += weight_pictures(found, heading(stage, recipe), prefix, ("png", "svg"))
    return drawn


def heading(stage: Stage, recipe: Recipe) -> str:
    """Method, model and budget."""
    budget = stage.pattern or (None if stage.sparsity is None else f"sparsity {stage.sparsity:g}")
    return f"{stage.method} on {recipe.model.name}" + (f", {budget}" if budget else "")


def _sparsity(folder: Path, rows: list[dict[str, Any]], prefix: str) -> Sparsity | None:
    """One stage's: by its masks, by the report's `rows`, or by zeros; None where nothing tells."""
    file = folder / artifact.TENSORS
    if file.exists():
        with safe_open(str(file), "pt") as tensors:
            masks = [name for name in tensors.keys() if name.startswith(prefix + MASK)]  # noqa: SIM118
            if masks:
                return of_counts(packed(masks, prefix + MASK, tensors.get_tensor))
    if rows and "matrices" not in rows[0]:
        return of_rows(rows)
    return of_counts(zeros(folder))


def packed(
    names: Iterable[str], prefix: str, read: Callable[[str], Tensor]
) -> Iterator[tuple[str, int, int]]:
    """Counts of packed masks; the last byte of a matrix whose size is no multiple of 8 counts as whole."""
    for name in names:
        bits = read(name).cpu()
        yield name.removeprefix(prefix), int(BITS[bits.int()].sum()), 8 * len(bits)


def zeros(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Counts of the zeros in the matrices of a folder's weights."""
    skip = {artifact.TENSORS, artifact.PROBE}
    for file in sorted(path for path in folder.glob("*.safetensors") if path.name not in skip):
        with safe_open(str(file), "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                module = name.removesuffix(".weight")
                dims = len(tensors.get_slice(name).get_shape())
                if dims < 2 or not IN_BLOCK.match(module) or module.rpartition(".")[2] in ROUTERS:
                    continue
                weight = tensors.get_tensor(name)
                yield module, int((weight == 0).sum()), weight.numel()


def of_counts(counts: Counts) -> Sparsity | None:
    """Matrices by block and module; the experts of a block are one module. None without matrices.

    Of an encoder with a decoder beside it the encoder's blocks come first.
    """
    gone: dict[tuple[tuple[bool, int], str], list[int]] = defaultdict(lambda: [0, 0])
    for name, removed, total in counts:
        stack, number, module = IN_BLOCK.match(name).groups(default="")
        block = "decoder." in stack, int(number)
        cell = gone[block, re.sub(r"\.\d+(?=\.|$)", "", module)]
        cell[0], cell[1] = cell[0] + removed, cell[1] + total
    if not gone:
        return None
    modules = sorted({module for _, module in gone}, key=in_order)
    order = sorted({block for block, _ in gone})
    cells = [
        [_share([gone[block, module]]) if (block, module) in gone else None for module in modules]
        for block in order
    ]
    whole = [_share([cell for (at, _), cell in gone.items() if at == block]) for block in order]
    return Sparsity(short(modules), cells, whole)


def _share(cells: list[list[int]]) -> float:
    removed, total = (sum(part) for part in zip(*cells, strict=True))
    return removed / total


def in_order(module: str) -> tuple[bool, int, str]:
    """Sorts modules as data goes through them, attention first."""
    last = module.rpartition(".")[2].removesuffix("_proj")
    return "att" not in module.lower(), ORDER.index(last) if last in ORDER else len(ORDER), module


def short(modules: list[str]) -> list[str]:
    """The last part of every name, or all of it where that is not enough to tell them apart."""
    last = [module.rpartition(".")[2] for module in modules]
    return last if len(set(last)) == len(last) else modules


def of_rows(rows: list[dict[str, Any]]) -> Sparsity:
    """What the report says of blocks that lost structure."""
    blocks = [row["sparsity"] for row in rows]
    kinds = [name for name in rows[0] if UNITS.match(str(rows[0][name]))]
    widths: dict[str, list[tuple[int, int] | None]] = {}
    for kind in kinds:
        counts = [tuple(map(int, UNITS.match(row[kind]).groups())) for row in rows]
        widths[kind] = [None if whole >= 1 else count for count, whole in zip(counts, blocks, strict=True)]
    cells = [
        [
            1.0 if widths[kind][place] is None else 1 - widths[kind][place][0] / widths[kind][place][1]
            for kind in kinds
        ]
        for place in range(len(rows))
    ]
    scores = {"influence": [row["influence"] for row in rows]} if "influence" in rows[0] else {}
    return Sparsity(kinds, cells, blocks, widths, scores)
