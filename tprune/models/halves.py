"""The two halves of a decoder block, attention and MLP with their norms: taken out, or left out for a while.

A half that is gone adds nothing to the residual stream. Something stands in its place, so that the block's own forward
stays as it is; norms that only fed the half, or only read it, go with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache

from tprune.core.units import columns_of
from tprune.core.weights import HALVES, StructureEdit
from tprune.errors import UserError
from tprune.models import experts
from tprune.models.blocks import Decoder, part_of
from tprune.models.replaced import replaced
from tprune.models.units import Site, site

LAYOUTS = (
    {
        "attention": (("self_attn",), ("input_layernorm", "post_attention_layernorm")),
        "mlp": (("mlp",), ("pre_feedforward_layernorm", "post_feedforward_layernorm")),
    },
    {
        "attention": (("self_attn",), ("input_layernorm",)),
        "mlp": (("mlp",), ("post_attention_layernorm",)),
    },
    {
        "attention": (("attention",), ("input_layernorm",)),
        "mlp": (("mlp",), ("post_attention_layernorm",)),
    },
    {"attention": (("attn",), ("ln_1",)), "mlp": (("mlp",), ("ln_2",))},
    {
        "attention": (("self_attn",), ("self_attn_layer_norm",)),
        "mlp": (("fc1", "fc2"), ("final_layer_norm",)),
    },
    {
        "attention": (("attention.self", "attention.output.dense"), ()),
        "mlp": (("intermediate", "output.dense"), ()),
    },
    {"attention": (("attention",), ()), "mlp": (("ffn",), ())},
)
"""Per layout of a block, what each half is made of: modules that compute it, and norms that belong to it alone (none in
encoders, whose norms are the residual stream's). The first layout whose names are all there is the block's."""


class NoAttention(nn.Module):
    """In the place of an attention that is gone.

    Transformers reads how long a cache is from single layers of it, so this one counts its tokens too, by one zero for
    each.
    """

    def __init__(self, layer_idx: int | None):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, *positional: Any, **named: Any) -> tuple[Tensor, None]:
        """A zero to add to hidden states [B, T, D], and no attention map."""
        hidden, *rest = (*positional, *named.values()) if positional else _hidden_first(named)
        for value in rest:
            if isinstance(value, Cache) and self.layer_idx is not None:
                place = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
                value.update(place, place, self.layer_idx)
        return hidden.new_zeros(()), None


def _hidden_first(named: dict[str, Any]) -> list[Any]:
    return [named["hidden_states"], *(value for name, value in named.items() if name != "hidden_states")]


class Nothing(nn.Module):
    """In the place of an MLP that is gone, or of one of its layers."""

    def forward(self, hidden: Tensor) -> Tensor:
        """A zero to add to hidden states."""
        return hidden.new_zeros(())


def stand_ins(block: nn.Module, half: str) -> dict[str, nn.Module]:
    """What takes the place of a block's modules when `half`, "attention" or "mlp", is gone, by their names.

    Raises:
        UserError: a block of an unknown layout.
    """
    modules, norms = _layout(block)[half]
    found: dict[str, nn.Module] = {name: Nothing() for name in modules}
    if half == "attention":
        found[modules[0]] = NoAttention(getattr(part_of(block, modules[0]), "layer_idx", None))
    # OPT-350m normalises the residual stream itself, behind each half.
    if getattr(block, "do_layer_norm_before", True):
        found |= {name: nn.Identity() for name in norms}
    return found


def _layout(block: nn.Module) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    layout = next((one for one in LAYOUTS if all(part_of(block, name) for name in _names(one))), None)
    if layout is None:
        raise UserError(
            f"{type(block).__name__}: attention and MLP cannot be taken out apart, its modules are not known here; "
            "choose a method that removes whole blocks, such as sleb"
        )
    return layout


def keeps_norms(block: nn.Module) -> bool:
    """Whether a block normalises the residual stream itself, so that it does something even without its halves."""
    own = any(norms for _, norms in _layout(block).values())
    return not own or not getattr(block, "do_layer_norm_before", True)


def half_sizes(decoder: Decoder, index: int) -> dict[str, int]:
    """Prunable weights of each half of a block.

    Raises:
        UserError: a block of an unknown layout.
    """
    layout, prefix = _layout(decoder.blocks[index]), decoder.block_name(index) + "."
    sizes = dict.fromkeys(HALVES, 0)
    for matrix in decoder.matrices(index):
        name = matrix.parameter_name.removeprefix(prefix)
        half = next(
            half
            for half, (parts, _) in layout.items()
            if name.startswith(tuple(f"{part}." for part in parts))
        )
        sizes[half] += matrix.shape[0] * matrix.shape[1]
    return sizes


def _names(layout: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]) -> list[str]:
    return [name for modules, norms in layout.values() for name in (*modules, *norms)]


def remove_half(block: nn.Module, half: str) -> None:
    """Take a half out; nothing happens where it is gone already."""
    for name, module in stand_ins(block, half).items():
        block.set_submodule(name, module)


def halves_gone(block: nn.Module) -> list[str]:
    """Which halves have been taken out, or are left out just now."""
    kinds = {"attention": NoAttention, "mlp": Nothing}
    parts = list(block.modules())
    return [half for half in HALVES if any(isinstance(part, kinds[half]) for part in parts)]


@contextmanager
def masked(decoder: Decoder, edits: Iterable[StructureEdit]) -> Iterator[None]:
    """The decoder computes as it would with the edits carried out; no weight is touched.

    Biases that edits bring are left out, and new weights of experts. What an edit keeps counts units of the decoder as
    it stands. Edits of one block add up, also those of a `masked` around this one; of new weights the innermost count.
    """
    with ExitStack() as stack:
        for edit in edits:
            block = decoder.blocks[edit.block]
            if edit.removed:
                stack.enter_context(replaced(block, _passes_on))
            for half in edit.halves:
                stack.enter_context(_left_out(block, half))
            for kind, keep in edit.keep.items():
                if kind == experts.KIND:
                    stack.enter_context(experts.without_others(decoder, edit.block, keep))
                    continue
                place = site(decoder, edit.block, kind)
                if kind in edit.weight:
                    stack.enter_context(replaced(place.reader, _rewritten(place, keep, edit.weight[kind])))
                elif place is not None:
                    stack.callback(_zeroing(place, keep).remove)
        yield


def _passes_on(hidden_states: Tensor, *positional: Any, **named: Any) -> Tensor:
    return hidden_states


@contextmanager
def _left_out(block: nn.Module, half: str) -> Iterator[None]:
    own = {name: block.get_submodule(name) for name in stand_ins(block, half)}
    remove_half(block, half)
    try:
        yield
    finally:
        for name, module in own.items():
            block.set_submodule(name, module)


def _zeroing(place: Site, keep: Tensor) -> torch.utils.hooks.RemovableHandle:
    """A hook that zeroes what the reader reads of all units but `keep`."""
    stays = torch.zeros(place.count, dtype=torch.bool).index_fill_(0, keep.cpu(), True)
    weight = place.reader.weight
    mask = stays.repeat_interleave(place.width).to(weight.device, weight.dtype)
    return place.reader.register_forward_pre_hook(lambda module, arguments: (arguments[0] * mask,))


def _rewritten(place: Site, keep: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """A forward of the reader that reads only the units `keep`, with `weight` [out, kept inputs]."""
    reader = place.reader
    columns = columns_of(keep, place.width).to(reader.weight.device)
    weight = weight.to(reader.weight.device, reader.weight.dtype)
    return lambda x: functional.linear(x.index_select(-1, columns), weight, reader.bias)
