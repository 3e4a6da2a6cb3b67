"""Embeddings and heads that are never whole in memory: a forward reads the rows it needs, or a tile after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tprune.errors import UserError
from tprune.models.shards import Shards

TILE = 2**23
"""Bytes of a matrix that are read at a time: enough for a product to keep a processor busy."""


class InFile(Tensor):
    """A matrix [R, C] that stays in its file: shape, dtype and device of one in memory, and rows for who asks for them.

    Whatever else wants its values is refused in one line: what reads no memory cannot read it wrongly.
    """

    shards: Shards
    stored: str
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls, shards: Shards, stored: str, shape: torch.Size, dtype: torch.dtype, device: torch.device | str
    ) -> InFile:
        """Of the matrix `stored` in the shards; a UserError where that has another shape."""
        shards.check(stored, shape)
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device(device))
        made.shards, made.stored = shards, stored
        return made

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, given: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> InFile:
        self = next(one for one in given if isinstance(one, InFile))
        if operation is torch.ops.aten.detach.default:  # as parameters are made and state dicts are
            return cls(self.shards, self.stored, self.shape, self.dtype, self.device)
        raise UserError(
            f"--max-memory: {self.stored} stays in its file, and this model wants all of it at once ({operation}); "
            "leave --max-memory out"
        )

    def __repr__(self) -> str:
        return f"InFile({self.stored!r}, shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    @property
    def tile(self) -> int:
        """Bytes that are held while tiles of it are read."""
        return min(self.nbytes, TILE)

    def at(self, index: Tensor) -> Tensor:
        """The rows `index`, int64 [n], in any order: [n, C]."""
        out = torch.empty(len(index), self.shape[1], dtype=self.dtype, device=self.device)
        self.shards.rows(self.stored, index, out)
        return out

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """All rows, as many at a time as `TILE` holds: the number of the first, and [n, C]."""
        count = max(1, TILE // (self.shape[1] * self.element_size()))
        for index in torch.arange(self.shape[0], device="cpu").split(count):
            yield int(index[0]), self.at(index)


def pieces(tensor: Tensor) -> Iterable[Tensor]:
    """A tensor's rows in order: at once, or one tile after the other where they stay in their file."""
    return (tile for _, tile in tensor.tiles()) if isinstance(tensor, InFile) else [tensor]


def ends(tensor: Tensor, count: int) -> Tensor:
    """The first and the last `count` values of a tensor, one after the other; all of them, twice, of a smaller one."""
    first = last = tensor
    if isinstance(tensor, InFile):
        rows = torch.arange(tensor.shape[0], device="cpu")
        few = -(-count // tensor.shape[1])
        first, last = tensor.at(rows[:few]), tensor.at(rows[-few:])
    return torch.cat([first.flatten()[:count], last.flatten()[-count:]])


def _embed(module: nn.Embedding) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:
        ids, place = input.unique(return_inverse=True)
        return functional.embedding(place, module.weight.at(ids))

    return forward


def _project(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        out = input.new_empty(*input.shape[:-1], weight.shape[0])
        for first, tile in weight.tiles():
            part = slice(first, first + len(tile))
            out[..., part] = functional.linear(input, tile, None if bias is None else bias[part])
        return out

    return forward


FORWARDS = {nn.Embedding: _embed, nn.Linear: _project}
"""What a module of exactly this type does with a matrix in a file. Subclasses do more: scale, cast, share out."""


def able(model: nn.Module) -> set[int]:
    """Ids of the weights of a model's input embedding and head that may stay in their files.

    They may where every module that has such a weight, tied or not, is one of `FORWARDS`.
    """
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    wanted = {id(module.weight) for module in both if type(module) in FORWARDS}
    for module in model.modules():
        plain = type(module) in FORWARDS and getattr(module, "max_norm", None) is None
        if not plain:
            wanted -= {id(parameter) for parameter in module.parameters(recurse=False)}
    return wanted


def run_in_place(model: nn.Module) -> None:
    """Have all modules whose weight is in a file read what they need of it."""
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), InFile):
            module.forward = FORWARDS[type(module)](module)
