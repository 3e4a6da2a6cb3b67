"""What is gathered at the inputs of a block's matrices while it runs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from threading import get_ident, local
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from tprune.core.statistics import KINDS, Inputs
from tprune.models.blocks import Decoder, is_experts
from tprune.models.threads import Turns


class _Piece(local):
    """What this thread sends through a module: whether further pieces of the batch follow."""

    more = False


_piece = _Piece()


class LastInput(Exception):  # noqa: N818  (a signal, not an error)
    """Raised where the last statistic of a block is gathered: what follows need not be computed."""


@contextmanager
def piece(more: bool) -> Iterator[None]:
    """Inside, a piece of a batch's tokens goes through modules, and, where `more`, further ones will."""
    _piece.more = more
    try:
        yield
    finally:
        _piece.more = False


class Watch:
    """Gathers statistics at the inputs of a block's modules while it runs in the thread that began.

    Modules that are given the same tensor (q, k and v; gate and up) share their statistics: they are found by the
    tensor's identity in the first batch. Where `turns` are given, several threads, each with a watch of its own, add
    to the same `inputs`; each then adds the pieces of a batch together.
    """

    def __init__(
        self,
        decoder: Decoder,
        index: int,
        kinds: tuple[str, ...],
        names: list[str] | None,
        inputs: dict[str, Inputs] | None = None,
        turns: Turns | None = None,
    ):
        self.kinds, self.turns = kinds, turns
        modules = decoder.inputs(index)
        self.modules = modules if names is None else {name: modules[name] for name in names}
        self.inputs = {} if inputs is None else inputs
        self._kept: dict[str, list[Tensor]] = {}
        self._leader: dict[str, str] = {}
        self._seen: list[tuple[weakref.ref[Tensor], str]] = []
        self._last: str | None = None
        self._begun: set[str] = set()
        self._stop = False
        self._sequences = 1
        self._number = 0
        self._thread: int | None = None

    def __enter__(self) -> Watch:
        self._hooks = []
        if any(kind in KINDS for kind in self.kinds):
            for name, module in self.modules.items():
                look = self._experts if is_experts(module) else self._linear
                self._hooks.append(module.register_forward_pre_hook(look(name)))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._seen.clear()

    def begin(self, sequences: int, stop: bool = False) -> None:
        """A new batch of so many sequences; with `stop`, `LastInput` is raised when all modules have seen it."""
        self._sequences, self._stop = sequences, stop
        self._last = None
        self._thread = get_ident()
        self._seen.clear()
        self._begun.clear()

    @contextmanager
    def batch(self, number: int, sequences: int) -> Iterator[None]:
        """Inside, the batch of this number runs, as far as there is something to see."""
        self.begin(sequences, stop=True)
        self._number = number
        with nullcontext() if self.turns is None else self.turns.job(number), suppress(LastInput):
            yield

    def end(self) -> None:
        """No more batches; what the thread does next is not looked at."""
        self._thread = None

    def _linear(self, name: str) -> Any:
        def look(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if get_ident() != self._thread:
                return
            x = arguments[0]
            if name not in self._leader:
                same = (leader for seen, leader in self._seen if seen() is x)
                self._leader[name] = next(same, name)
                self._seen.append((weakref.ref(x), name))
                self.inputs[name] = self.inputs.setdefault(self._leader[name], Inputs(self.kinds))
            if self._leader[name] == name:
                # OPT flattens its tokens before the MLP.
                x = x.detach()
                self._take(name, x if x.dim() == 3 else x.unflatten(0, (self._sequences, -1)))
            self._done(name)

        return look

    def _take(self, name: str, x: Tensor) -> None:
        """Add an input [b, ·, C], or keep it until the batch has no further pieces where others wait for their turn."""
        if self.turns is None:
            self.inputs[name].add(x, goes_on=name in self._begun)
            return
        kept = self._kept.setdefault(name, [])
        kept.append(x)
        if not _piece.more:
            with self._turn(name):
                for place, part in enumerate(kept):
                    self.inputs[name].add(part, goes_on=place > 0)
            kept.clear()

    def _turn(self, name: str) -> AbstractContextManager[None]:
        """Inside, nobody else adds to this input's statistics."""
        return nullcontext() if self.turns is None else self.turns.at(name, self._number)

    def _experts(self, name: str) -> Any:
        """Routed experts: each sees the tokens sent to it, and its second matrix what its first makes of them."""

        def look(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if get_ident() != self._thread:
                return
            x, chosen = arguments[0], arguments[1]
            with self._turn(name):
                for expert in range(module.gate_up_proj.shape[0]):
                    first = self.inputs.setdefault(f"{name}.{expert}.in", Inputs(self.kinds))
                    second = self.inputs.setdefault(f"{name}.{expert}.out", Inputs(self.kinds))
                    mine = x[(chosen == expert).any(-1)]
                    if len(mine):
                        first.add(mine)
                        second.add(_expert_activation(module, expert, mine))
            self._done(name)

        return look

    def _done(self, name: str) -> None:
        """A module has seen the batch; the last one of all stops it, at every piece."""
        self._begun.add(name)
        if self._last is None and len(self._begun) == len(self.modules):
            self._last = name
        if self._stop and name == self._last:
            raise LastInput


def _expert_activation(module: nn.Module, expert: int, x: Tensor) -> Tensor:
    """What enters an expert's down_proj, [T, m], for the tokens x [T, d]."""
    weight = module.gate_up_proj[expert]
    out = x @ weight if getattr(module, "is_transposed", False) else functional.linear(x, weight)
    if getattr(module, "has_bias", False):
        out = out + module.gate_up_proj_bias[expert]
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(out)
    gate, up = out.chunk(2, dim=-1)
    return module.act_fn(gate) * up


def united(parts: list[dict[str, Inputs]]) -> dict[str, Inputs]:
    """The statistics of several workers as if one had gathered them; a module need not have run for all of them."""
    found: dict[str, Inputs] = {}
    for part in parts:
        for name, inputs in part.items():
            found.setdefault(name, inputs)
    if len(parts) > 1:
        for inputs, name in {inputs: name for name, inputs in found.items()}.items():
            inputs.join([part[name].share() for part in parts if name in part])
    return found
