"""Seeing the queries, keys and values of a transformers model's attention while its own fast kernel runs.

transformers looks its attention function up by name, in the config of each attention module. A tapped module gets a
config of its own, a shallow copy in which that name is ours; our function shows the call to the observers and
hands it on to the implementation the module had before. The model's config is not touched: masks are made as before,
models that share a config do not see each other's taps, and removing a tap puts the very same config object back.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tprune.methods.attention import Attention

PREFIX = "tprune_"

Output = tuple[Tensor, Tensor | None]


@dataclass(eq=False)
class AttentionCall:
    """One call of an attention function, after RoPE and after the cache was updated.

    Attributes:
        module: the attention module.
        query: [B, H, q, d].
        key, value: [B, G, T, d]; with a cache, T counts the cached entries too.
        mask: additive or bool (True: visible), broadcastable to [B, H, q, T], or None.
        scale: what the logits are multiplied with.
        causal: whether None as a mask means that row i sees keys up to T - q + i.
        softcap: the bound of Gemma's tanh on the logits, or None.
        attend: the implementation itself, (query, key, value, mask) -> (output [B, q, H, d], weights or None), for
            observers that take over.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    causal: bool
    softcap: float | None = None
    attend: Callable[..., Output] | None = None

    def view(self) -> Attention:
        """The call as methods see it; keys beyond a mask's width (static caches) are not part of it."""
        mask = self.mask
        if mask is not None and mask.dim() == 2:
            mask = mask[:, None, None]
        return Attention(
            self.query, self.key, self.value, self.scale, bias=mask, causal=self.causal, softcap=self.softcap
        )


Observer = Callable[[AttentionCall], Output | None]


class Tap:
    """An observer on some attention modules, until `remove` or the end of a `with` block.

    Several taps may stand on one module; they are called in the order they came, before the attention runs. An
    observer that returns an output has run the attention itself, by `call.attend`, and the last such output counts.
    One that is `first` is called before all that are there.
    """

    def __init__(self, modules: Iterable[nn.Module], observer: Observer, first: bool = False):
        self.modules, self.observer = list(modules), observer
        for module in self.modules:
            _install(module, self, first)

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the observer off; the last tap on a module restores its config object."""
        for module in self.modules:
            _uninstall(module, self)
        self.modules = []


class Capture:
    """Keeps the latest call of some attention modules; a module that runs its attention in pieces keeps them all.

    Attributes:
        calls: per module, the calls since `clear`, in order.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        self.calls: dict[nn.Module, list[AttentionCall]] = {}
        self.tap = Tap(modules, self._keep)

    def _keep(self, call: AttentionCall) -> None:
        self.calls.setdefault(call.module, []).append(call)

    def clear(self) -> None:
        """Forget all calls."""
        self.calls.clear()

    def remove(self) -> None:
        """Take the tap off."""
        self.tap.remove()
        self.clear()


@dataclass(eq=False)
class _Tapped:
    """What a tapped module carries: the taps on it, and the config it had."""

    taps: list[Tap]
    config: Any


def _install(module: nn.Module, tap: Tap, first: bool) -> None:
    tapped = module.__dict__.get("_tprune_taps")
    if tapped is None:
        own = copy.copy(module.config)
        # The public setter would write through to the configs of sub-models, which are shared.
        own._attn_implementation_internal = _registered(module.config._attn_implementation)
        tapped = module.__dict__["_tprune_taps"] = _Tapped([], module.config)
        module.config = own
    tapped.taps.insert(0 if first else len(tapped.taps), tap)


def _uninstall(module: nn.Module, tap: Tap) -> None:
    tapped = module.__dict__.get("_tprune_taps")
    if tapped is None or tap not in tapped.taps:
        return
    tapped.taps.remove(tap)
    if not tapped.taps:
        module.config = tapped.config
        del module.__dict__["_tprune_taps"]


def _registered(implementation: str | None) -> str:
    """The name of the observing twin of an implementation, registered with its mask at its first use.

    Without a mask of its own a custom attention would get none at all, and SDPA would then cut the keys of a
    prompt that follows a cache.
    """
    implementation = implementation or "eager"
    name = PREFIX + implementation
    AttentionInterface.register(name, partial(_observe, implementation))
    if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def _observe(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Output:
    """Show the call to the module's observers, then run the implementation it had."""
    scale = kwargs.get("scaling")
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    attend = partial(ALL_ATTENTION_FUNCTIONS.get_interface(implementation, _eager(module)), module)
    call = AttentionCall(
        module,
        query,
        key,
        value,
        attention_mask,
        query.shape[-1] ** -0.5 if scale is None else scale,
        bool(causal) and attention_mask is None and query.shape[2] > 1,
        kwargs.get("softcap"),
        partial(attend, **kwargs),
    )
    output = None
    for tap in list(module._tprune_taps.taps):
        output = tap.observer(call) or output
    return output or call.attend(query, key, value, attention_mask)


def _eager(module: nn.Module) -> Callable[..., Output] | None:
    """The eager attention of the file that defines the module: every model has its own."""
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    return None
