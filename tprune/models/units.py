"""Removable structure of a language model: attention heads as whole key-value groups, MLP channels, whole blocks.

Removing a unit takes its rows out of the projections that feed it and its columns out of the one that reads it,
which equals zeroing them. What the configuration then says is the business of `tprune.models.shapes`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tprune.models.blocks import CHANNELS, Decoder, is_linear, key_value_heads, part_of, width
from tprune.models.matrix import Matrix

WIRING = {
    "heads": (
        ("self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj"),
        ("self_attn", ("q_proj", "k_proj", "v_proj"), "out_proj"),
        ("self_attn", ("qkv_proj",), "o_proj"),
        ("attention", ("query_key_value",), "dense"),
        ("attention", ("q_proj", "k_proj", "v_proj"), "o_proj"),
        ("attn", ("qkv",), "proj"),
        ("attn", ("q_proj", "k_proj", "v_proj"), "proj"),
        ("attn", ("c_attn",), "c_proj"),
        ("attention", ("self.query", "self.key", "self.value"), "output.dense"),
        ("attention", ("q_lin", "k_lin", "v_lin"), "out_lin"),
    ),
    "channels": CHANNELS,
}
"""Per kind of unit: the submodule of a block, the projections that feed the units, the one that reads them."""
PER_LAYER = ("layer_types", "mlp_only_layers", "no_rope_layers")
"""Entries of a configuration that name or list layers."""


@dataclass(eq=False)
class Site:
    """Where the units of one kind are in one block.

    Attributes:
        kind: "heads" or "channels".
        parent: the submodule of the block; of an attention the one that knows how many heads it has.
        feeds: the feeding projections, by their full name.
        reader: the projection that reads the units, and `reader_name` its full name.
        count: how many units there are.
        heads: query heads per unit; 1 for channels.
    """

    kind: str
    parent: nn.Module
    feeds: dict[str, nn.Module]
    reader: nn.Module
    reader_name: str
    count: int
    heads: int

    @property
    def width(self) -> int:
        """Inputs of the reader that belong to one unit."""
        return width(self.reader)[1] // self.count

    @property
    def cost(self) -> int:
        """Weights of one unit, in the projections on both sides."""
        feeding = sum(module.weight.numel() for module in self.feeds.values())
        return (feeding + self.reader.weight.numel()) // self.count


def site(decoder: Decoder, index: int, kind: str) -> Site | None:
    """The units of `kind` in block `index`; None where they cannot be removed there (experts, shared norms)."""
    block, name = decoder.blocks[index], decoder.block_name(index)
    for parent_name, feeds, reader in WIRING[kind]:
        parent = part_of(block, parent_name)
        if parent is None or not all(is_linear(part_of(parent, part)) for part in (*feeds, reader)):
            continue
        prefix = f"{name}.{parent_name}." if parent_name else f"{name}."
        reads = part_of(parent, reader)
        found = Site(
            kind,
            part_of(parent, feeds[0].rpartition(".")[0]),
            {prefix + part: part_of(parent, part) for part in feeds},
            reads,
            prefix + reader,
            0,
            1,
        )
        if kind == "channels":
            found.count = width(reads)[1]
            return found if _by_channel(found) else None
        size = head_size(found.parent)
        if not _by_head(found.parent, size, width(reads)[1] // size):
            return None
        found.heads = decoder.config.num_attention_heads // key_value_heads(decoder.config)
        found.count = width(reads)[1] // (size * found.heads)
        return found
    return None


def _by_channel(place: Site) -> bool:
    """Whether every channel has a row of its own in each feeding projection, and no norm mixes it with others."""
    fused = {"gate_up_proj": 2}
    return not _weighs(place.parent, "norm") and all(
        width(module)[0] == fused.get(name.rpartition(".")[2], 1) * place.count
        for name, module in place.feeds.items()
    )


def _by_head(attention: nn.Module, size: int, count: int) -> bool:
    """Whether an attention has nothing but its projections that tells `count` heads, of `size` values, apart."""
    # timm's differential attention has two maps of a head's half width for each head.
    if getattr(attention, "num_heads", count) != count:
        return False
    norms = (_weighs(attention, norm) for norm in ("q_norm", "k_norm"))
    if any(weights not in (0, size) for weights in norms):
        return False
    # EVA's makes its outputs as wide as its inputs again, however many heads it has.
    mixes = _weighs(attention, "norm") or _weighs(attention, "gate")
    return not mixes and type(attention).__name__ != "EvaAttention"


def _weighs(module: nn.Module, part: str) -> int:
    """How many weights the part of this name has; 0 for one without, and where there is none."""
    weight = getattr(getattr(module, part, None), "weight", None)
    return 0 if weight is None else weight.numel()


def members(decoder: Decoder, index: int, place: Site) -> list[tuple[Matrix, int]]:
    """The dependency group of the units: the matrices they are in, each with the axis of [out, in] that lists them.

    Along it every unit has equally many consecutive entries. The matrices that feed the units come first, the one that
    reads them last.
    """
    names = [*place.feeds, place.reader_name]
    found = [matrix for matrix in decoder.matrices(index) if matrix.input in names]
    found.sort(key=lambda matrix: names.index(matrix.input))
    return [(matrix, int(matrix.input == place.reader_name)) for matrix in found]


def by_unit(weight: Tensor, axis: int, count: int) -> Tensor:
    """What each of `count` units has of a weight [out, in] that lists them along `axis`: [count, R, other], where R
    rows (axis 0) or columns (axis 1) belong to each.
    """
    return (weight.t() if axis else weight).unflatten(0, (count, -1))


def shrink(decoder: Decoder, index: int, place: Site, keep: Tensor) -> None:
    """Keep only these units, ascending."""
    group = members(decoder, index, place)
    for name, module in place.feeds.items():
        _keep_outputs(module, _rows(place, [one for one, axis in group if one.input == name], keep))
    columns = torch.arange(place.count * place.width, device="cpu").view(place.count, place.width)
    _keep_inputs(place.reader, columns[keep.cpu()].flatten())
    if place.kind == "heads":
        set_heads(place, len(keep), decoder.config)


def _rows(place: Site, parts: list[Matrix], keep: Tensor) -> Tensor:
    """The parameter rows of the units `keep`, in all matrices of one projection, ascending: int64."""
    rows = []
    for part in parts:
        own = torch.arange(part.shape[0], device="cpu") if part.rows is None else part.rows
        rows.append(own.view(place.count, -1)[keep.cpu()].flatten())
    return torch.cat(rows).sort().values


def head_size(attention: nn.Module) -> int:
    """How many values a head has."""
    names = ("head_dim", "head_size", "attention_head_size")
    return next(getattr(attention, name) for name in names if getattr(attention, name, None))


def set_heads(place: Site, groups: int, config: Any) -> None:
    """Tell an attention module how many key-value groups it has, where it remembers."""
    attention, heads = place.parent, groups * place.heads
    for name, value in (
        ("num_heads", heads),
        ("num_attention_heads", heads),
        ("n_heads", heads),
        ("num_key_value_heads", groups),
        ("num_kv_heads", groups),
        ("attn_dim", heads * head_size(attention)),
        ("kv_dim", groups * head_size(attention)),
        ("split_size", heads * head_size(attention)),
        ("all_head_size", heads * head_size(attention)),
    ):
        if hasattr(attention, name):
            setattr(attention, name, value)
    if any(name.endswith("qkv_proj") for name in place.feeds):
        # Phi-3 splits its fused projection at a place it reads from the configuration.
        attention.config = copy.copy(config)
        attention.config.num_attention_heads = heads


def _keep_outputs(module: nn.Module, rows: Tensor) -> None:
    axis = 1 if isinstance(module, Conv1D) else 0
    put(module, "weight", module.weight.data.index_select(axis, rows.to(module.weight.device)))
    if module.bias is not None:
        put(module, "bias", module.bias.data[rows.to(module.bias.device)])
    _set_width(module)


def _keep_inputs(module: nn.Module, columns: Tensor) -> None:
    axis = 0 if isinstance(module, Conv1D) else 1
    put(module, "weight", module.weight.data.index_select(axis, columns.to(module.weight.device)))
    _set_width(module)


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Make `value` the module's parameter `name`."""
    trained = module.weight.requires_grad
    setattr(module, name, nn.Parameter(value.contiguous(), requires_grad=trained))


def _set_width(module: nn.Module) -> None:
    outputs, inputs = width(module)
    if isinstance(module, Conv1D):
        module.nf, module.nx = outputs, inputs
    else:
        module.out_features, module.in_features = outputs, inputs


def set_weight(module: nn.Module, weight: Tensor) -> None:
    """Make a copy of `weight` [out, in] a linear layer's own, in its dtype."""
    stored = weight.t() if is_transposed(module) else weight
    put(module, "weight", stored.to(module.weight.device, module.weight.dtype, copy=True))


def add_bias(module: nn.Module, bias: Tensor) -> None:
    """Add `bias` [out] to a linear layer's own, or give it one."""
    old = 0 if module.bias is None else module.bias.data.float()
    put(module, "bias", (old + bias.to(module.weight.device)).to(module.weight.dtype))


def remove_blocks(decoder: Decoder, gone: list[int]) -> None:
    """Take out whole blocks; the others are renumbered, in modules and configuration, so that caches stay right."""
    config, before = decoder.config, len(decoder.blocks)
    stay = [index for index in range(before) if index not in set(gone)]
    dense_mlp = _dense_mlp_layers(config, before)
    for index in reversed(gone):
        del decoder.blocks[index]
    for place, block in enumerate(decoder.blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    for name in PER_LAYER:
        listed = getattr(config, name, None)
        if isinstance(listed, list) and len(listed) == before and name != "mlp_only_layers":
            setattr(config, name, [listed[index] for index in stay])
    if dense_mlp is not None:
        config.decoder_sparse_step = 1
        config.mlp_only_layers = [place for place, index in enumerate(stay) if index in dense_mlp]
    config.num_hidden_layers = len(stay)
    if hasattr(config, "stage_names"):  # what a backbone calls its blocks
        config.stage_names = config.stage_names[: len(stay) + 1]
        config.set_output_features_output_indices(None, None)


def _dense_mlp_layers(config: Any, depth: int) -> set[int] | None:
    """Which layers of a Qwen-MoE have no experts; None for models without that rule."""
    step = getattr(config, "decoder_sparse_step", None)
    if step is None:
        return None
    only = getattr(config, "mlp_only_layers", None) or []
    return {index for index in range(depth) if index in only or (index + 1) % step}


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer stores its weight [in, out]."""
    return isinstance(module, Conv1D)
