"""Low-rank changes of a model's linear layers by peft, trained and merged under the masks of what was pruned."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tprune.models.blocks import is_linear
from tprune.models.find import find_blocks


def changed(model: nn.Module) -> list[str]:
    """The parameters that `low_rank` changes: the weights of the linear layers in the decoder blocks."""
    decoder = find_blocks(model)
    return [
        f"{name}.weight"
        for index in range(len(decoder.blocks))
        for name, module in decoder.inputs(index).items()
        if is_linear(module)
    ]


@contextmanager
def low_rank(
    model: nn.Module, rank: int, alpha: float, seed: int, kept: Mapping[str, Tensor]
) -> Iterator[None]:
    """A trainable low-rank change W + (α / rank) · B A of every linear layer in the decoder blocks; merged at the end.

    B starts at zero, A is drawn from the seed. Where a mask is known the change is masked before it is used, so
    that what is merged is what was trained and no zero is lost. Stacked experts and routers stay as they are.

    Args:
        model: its own weights stand still.
        rank, alpha, seed: of the change.
        kept: bool, of the shape of the parameter, by its name: which weights may change; all of what is missing.

    An error on the way leaves the weights without it.
    """
    from peft import LoraConfig, get_peft_model

    names = [name.removesuffix(".weight") for name in changed(model)]
    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft asks transformers by names that are going out of use.
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=names))
    layers = {name: adapted.base_model.model.get_submodule(name) for name in names}
    for name, layer in layers.items():
        if f"{name}.weight" in kept:
            layer.forward = _under_mask(layer, kept[f"{name}.weight"])
    try:
        yield
        with torch.no_grad():
            for name, layer in layers.items():
                layer.get_base_layer().weight += _change(layer, kept.get(f"{name}.weight"))
    finally:
        adapted.unload()


def _change(layer: Any, kept: Tensor | None) -> Tensor:
    """What peft's `layer` adds to its weight, in the weight's shape and dtype."""
    change = layer.get_delta_weight("default")
    return (change if kept is None else change * kept).to(layer.get_base_layer().weight.dtype)


def _under_mask(layer: Any, kept: Tensor) -> Callable[[Tensor], Tensor]:
    """The forward of peft's `layer` with its change masked."""

    def forward(x: Tensor) -> Tensor:
        base = layer.get_base_layer()
        weight = base.weight + _change(layer, kept)
        return functional.linear(x, weight.t() if layer.fan_in_fan_out else weight, base.bias)

    return forward
