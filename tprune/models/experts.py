"""Experts of a mixture as removable units: taken out with their rows of the router, or left out for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tprune.core.weights import StructureEdit
from tprune.errors import UserError
from tprune.models.blocks import Decoder, is_experts
from tprune.models.matrix import Matrix

KIND = "experts"
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What models and their configurations call the number of experts."""
CHOSEN = ("num_experts_per_tok", "top_k")
"""What they call how many of them a token goes through; only modules say top_k."""


@dataclass(eq=False)
class Mixture:
    """The experts of one block, and the router that chooses among them.

    Attributes:
        experts, router: the modules; the router's tensors have a row for every expert.
        matrices: per expert, those that feed its channels and the one that reads them (gate, up, down).
    """

    experts: nn.Module
    router: nn.Module
    matrices: list[list[Matrix]]

    @property
    def count(self) -> int:
        """E, how many experts."""
        return len(self.matrices)

    @property
    def cost(self) -> int:
        """Prunable weights of one expert."""
        return sum(matrix.shape[0] * matrix.shape[1] for matrix in self.matrices[0])

    def neurons(self, expert: int) -> Tensor:
        """The neurons of an expert, float32 [m, 3 D]: its row of gate, its row of up, its column of down."""
        gate, up, down = (matrix.read() for matrix in self.matrices[expert])
        return torch.cat([gate, up, down.t()], 1)

    def write(self, expert: int, neurons: Tensor) -> None:
        """Give an expert these `neurons`."""
        gate, up, down = neurons.chunk(3, 1)
        for matrix, part in zip(self.matrices[expert], (gate, up, down.t()), strict=True):
            matrix.write(part.to(matrix.parameter.device))


def mixture(decoder: Decoder, index: int) -> Mixture | None:
    """The experts of block `index`; None where it has none.

    Raises:
        UserError: experts without a router beside them, or such as are chosen group by group.
    """
    for module in decoder.blocks[index].modules():
        stacked = next((child for child in module.children() if is_experts(child)), None)
        if stacked is None:
            continue
        found: dict[int, list[Matrix]] = {}
        for matrix in decoder.matrices(index):
            if matrix.expert is not None:
                found.setdefault(matrix.expert, []).append(matrix)
        router = next((getattr(module, name) for name in ("gate", "router") if hasattr(module, name)), None)
        if (
            router is None
            or not _rows(router, len(found))
            or (getattr(decoder.config, "n_group", 1) or 1) > 1
        ):
            raise UserError(
                f"the experts of {type(decoder.model).__name__} are chosen group by group, or by a router that is not "
                "known here; they cannot be removed"
            )
        return Mixture(stacked, router, [found[expert] for expert in sorted(found)])
    return None


def keep_experts(decoder: Decoder, edits: Iterable[StructureEdit]) -> None:
    """Keep the experts that the edits say, with new weights where they bring them; the configuration says so.

    Raises:
        UserError: not every block with experts keeps the same number.
    """
    keeps = {edit.block: edit for edit in edits if KIND in edit.keep}
    if not keeps:
        return
    found = {index: mixture(decoder, index) for index in range(len(decoder.blocks))}
    before = next(one.count for one in found.values() if one is not None)
    counts = {
        len(keeps[index].keep[KIND]) if index in keeps else one.count for index, one in found.items() if one
    }
    if len(counts) > 1:
        raise UserError(f"every block must keep as many experts, not {', '.join(map(str, sorted(counts)))}")
    after = counts.pop()
    for index, edit in keeps.items():
        own = found[index]
        for module in (own.experts, own.router):
            for name in _rows(module, own.count):
                _set(module, name, getattr(module, name)[edit.keep[KIND].to(getattr(module, name).device)])
        if KIND in edit.weight:
            left = mixture(decoder, index)
            for expert, neurons in enumerate(edit.weight[KIND]):
                left.write(expert, neurons)
    _say(decoder.config, before, after, CHOSEN[:1])
    for module in decoder.model.modules():
        _say(module, before, after, CHOSEN)


@contextmanager
def without_others(decoder: Decoder, index: int, keep: Tensor) -> Iterator[None]:
    """The router of block `index` chooses among the experts `keep` alone; none is touched."""
    found = mixture(decoder, index)
    router = found.router
    own = {name: getattr(router, name) for name in _rows(router, found.count)}
    chosen = getattr(router, "top_k", None)
    kept = keep.to(next(iter(own.values())).device)

    def back(module: nn.Module, arguments: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(part if part.is_floating_point() else kept[part] for part in output)

    hook = router.register_forward_hook(back)
    try:
        for name, value in own.items():
            _set(router, name, value[kept])
        if chosen is not None:
            router.top_k = min(chosen, len(keep))
        yield
    finally:
        hook.remove()
        for name, value in own.items():
            setattr(router, name, value)
        if chosen is not None:
            router.top_k = chosen


@contextmanager
def watching_routes(decoder: Decoder, index: int) -> Iterator[dict[str, Tensor]]:
    """What the router of block `index` does while it runs, once the `with` ends.

    Yields:
        "experts.uses", float64 [E], how many tokens went to each expert; "experts.worth", the sum of their weights.
    """
    own = mixture(decoder, index)
    found: dict[str, Tensor] = {}
    if own is None:
        yield found
        return
    uses, worth = (torch.zeros(own.count, dtype=torch.float64) for _ in range(2))

    def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        chosen, weights = arguments[1].flatten().cpu(), arguments[2].flatten().double().cpu()
        uses.index_add_(0, chosen, torch.ones_like(weights))
        worth.index_add_(0, chosen, weights)

    with own.experts.register_forward_pre_hook(note):
        yield found
    found |= {"experts.uses": uses, "experts.worth": worth}


def _rows(module: nn.Module, count: int) -> list[str]:
    """The tensors of a module itself that have a row for each of `count` experts."""
    held = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return [name for name, value in held if value.dim() and value.shape[0] == count]


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    """Make `value` the module's parameter or buffer `name`."""
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value.detach().contiguous(), requires_grad=old.requires_grad)
    setattr(module, name, value)


def _say(holder: Any, before: int, after: int, chosen: Iterable[str]) -> None:
    """Tell a module or the configuration how many experts there are, where it remembers."""
    counts = [name for name in COUNTS if getattr(holder, name, None) == before]
    for name in counts:
        setattr(holder, name, after)
    for name in chosen if counts else ():
        if isinstance(getattr(holder, name, None), int):
            setattr(holder, name, min(getattr(holder, name), after))
