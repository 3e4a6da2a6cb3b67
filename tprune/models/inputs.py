"""What is gathered at the inputs of a block's matrices while it runs."""

from __future__ import annotations

import weakref
from threading import get_ident
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from tprune.core.statistics import KINDS, Inputs
from tprune.models.blocks import Decoder, is_experts


class LastInput(Exception):  # noqa: N818  (a signal, not an error)
    """Raised where the last statistic of a block is gathered: what follows need not be computed."""


class Watch:
    """Gathers statistics at the inputs of a block's modules while it runs in the thread that began.

    Modules that are given the same tensor (q, k and v; gate and up) share their statistics: they are found by the
    tensor's identity in the first batch. The last input is remembered, so that later batches can stop there.
    """

    def __init__(self, decoder: Decoder, index: int, kinds: tuple[str, ...], names: list[str] | None):
        self.kinds = kinds
        modules = decoder.inputs(index)
        self.modules = modules if names is None else {name: modules[name] for name in names}
        self.inputs: dict[str, Inputs] = {}
        self._leader: dict[str, str] = {}
        self._seen: list[tuple[weakref.ref[Tensor], str]] = []
        self._last: str | None = None
        self._begun: set[str] = set()
        self._stop = False
        self._sequences = 1
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

    def begin(self, sequences: int, stop: bool) -> None:
        """A new batch of so many sequences; it stops at the last input of the one before, if `stop`."""
        self._sequences = sequences
        self._stop = stop and self._last is not None
        self._thread = get_ident()
        self._seen.clear()
        self._begun.clear()

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
                leader = self._leader[name]
                self.inputs[name] = Inputs(self.kinds) if leader == name else self.inputs[leader]
            if self._leader[name] == name:
                # OPT flattens its tokens before the MLP.
                x = x.detach()
                x = x if x.dim() == 3 else x.unflatten(0, (self._sequences, -1))
                self.inputs[name].add(x, goes_on=name in self._begun)
                self._begun.add(name)
            self._done(name)

        return look

    def _experts(self, name: str) -> Any:
        """Routed experts: each sees the tokens sent to it, and its second matrix what its first makes of them."""

        def look(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if get_ident() != self._thread:
                return
            x, chosen = arguments[0], arguments[1]
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
        if not self._stop:
            self._last = name
        elif name == self._last:
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
