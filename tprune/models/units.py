"""Removable structure of a decoder: attention heads as whole key-value groups, MLP channels, whole blocks.

Removing a unit takes its rows out of the projections that feed it and its columns out of the one that reads it,
which equals zeroing them. Blocks that keep different widths are described in a `tprune` section of the
configuration (`describe`), from which `resize` builds the same shapes again before weights are loaded.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tprune.core.weights import StructureEdit
from tprune.models.blocks import Decoder, Matrix, is_linear, key_value_heads, width

WIRING = {
    "heads": (
        ("self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj"),
        ("self_attn", ("q_proj", "k_proj", "v_proj"), "out_proj"),
        ("self_attn", ("qkv_proj",), "o_proj"),
        ("attention", ("query_key_value",), "dense"),
        ("attn", ("c_attn",), "c_proj"),
    ),
    "channels": (
        ("mlp", ("gate_proj", "up_proj"), "down_proj"),
        ("mlp", ("gate_up_proj",), "down_proj"),
        ("mlp", ("c_fc",), "c_proj"),
        ("mlp", ("dense_h_to_4h",), "dense_4h_to_h"),
        ("", ("fc1",), "fc2"),
    ),
}
"""Per kind of unit: the submodule of a block, the projections that feed the units, the one that reads them."""
PER_LAYER = ("layer_types", "mlp_only_layers", "no_rope_layers")
"""Entries of a configuration that name or list layers."""


@dataclass(eq=False)
class Site:
    """Where the units of one kind are in one block.

    Attributes:
        kind: "heads" or "channels".
        parent: the submodule of the block.
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
        parent = getattr(block, parent_name, None) if parent_name else block
        if parent is None or not all(is_linear(getattr(parent, part, None)) for part in (*feeds, reader)):
            continue
        prefix = f"{name}.{parent_name}." if parent_name else f"{name}."
        reads = getattr(parent, reader)
        found = Site(
            kind,
            parent,
            {prefix + part: getattr(parent, part) for part in feeds},
            reads,
            prefix + reader,
            0,
            1,
        )
        if kind == "channels":
            found.count = width(reads)[1]
            return found
        size = getattr(parent, "head_dim", None) or parent.head_size
        norms = (getattr(parent, norm, None) for norm in ("q_norm", "k_norm"))
        if any(norm is not None and norm.weight.numel() != size for norm in norms):
            return None
        found.heads = decoder.config.num_attention_heads // key_value_heads(decoder.config)
        found.count = width(reads)[1] // (size * found.heads)
        return found
    return None


def apply(decoder: Decoder, edits: list[StructureEdit]) -> None:
    """Carry out the edits in the model and in its configuration."""
    before = shapes(decoder)
    for edit in edits:
        for kind, keep in edit.keep.items():
            place = site(decoder, edit.block, kind)
            _shrink(decoder, edit.block, place, keep)
        for kind, bias in edit.bias.items():
            _add_bias(site(decoder, edit.block, kind).reader, bias)
    gone = sorted(edit.block for edit in edits if edit.removed)
    if gone:
        remove_blocks(decoder, gone)
    write_config(decoder, [row for index, row in enumerate(before) if index not in gone])


def _shrink(decoder: Decoder, index: int, place: Site, keep: Tensor) -> None:
    """Keep only these units, ascending."""
    matrices = decoder.matrices(index)
    for name, module in place.feeds.items():
        _keep_outputs(module, _rows(place, [one for one in matrices if one.input == name], keep))
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


def set_heads(place: Site, groups: int, config: Any) -> None:
    """Tell an attention module how many key-value groups it has, where it remembers."""
    attention, heads = place.parent, groups * place.heads
    size = getattr(attention, "head_dim", None) or attention.head_size
    for name, value in (
        ("num_heads", heads),
        ("num_attention_heads", heads),
        ("num_key_value_heads", groups),
        ("split_size", heads * size),
    ):
        if hasattr(attention, name):
            setattr(attention, name, value)
    if any(name.endswith("qkv_proj") for name in place.feeds):
        # Phi-3 splits its fused projection at a place it reads from the configuration.
        attention.config = copy.copy(config)
        attention.config.num_attention_heads = heads


def _keep_outputs(module: nn.Module, rows: Tensor) -> None:
    axis = 1 if isinstance(module, Conv1D) else 0
    _replace(module, "weight", module.weight.data.index_select(axis, rows.to(module.weight.device)))
    if module.bias is not None:
        _replace(module, "bias", module.bias.data[rows.to(module.bias.device)])
    _set_width(module)


def _keep_inputs(module: nn.Module, columns: Tensor) -> None:
    axis = 0 if isinstance(module, Conv1D) else 1
    _replace(module, "weight", module.weight.data.index_select(axis, columns.to(module.weight.device)))
    _set_width(module)


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    setattr(module, name, nn.Parameter(value.contiguous(), requires_grad=False))


def _set_width(module: nn.Module) -> None:
    outputs, inputs = width(module)
    if isinstance(module, Conv1D):
        module.nf, module.nx = outputs, inputs
    else:
        module.out_features, module.in_features = outputs, inputs


def _add_bias(module: nn.Module, bias: Tensor) -> None:
    old = 0 if module.bias is None else module.bias.data.float()
    _replace(module, "bias", (old + bias.to(module.weight.device)).to(module.weight.dtype))


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


def _dense_mlp_layers(config: Any, depth: int) -> set[int] | None:
    """Which layers of a Qwen-MoE have no experts; None for models without that rule."""
    step = getattr(config, "decoder_sparse_step", None)
    if step is None:
        return None
    only = getattr(config, "mlp_only_layers", None) or []
    return {index for index in range(depth) if index in only or (index + 1) % step}


def shapes(decoder: Decoder) -> list[dict[str, Any]]:
    """Per block, how many units of each kind there are, and whether their reader has a bias."""
    rows = []
    for index in range(len(decoder.blocks)):
        places = {kind: site(decoder, index, kind) for kind in WIRING}
        rows.append(
            {kind: [place.count, place.reader.bias is not None] for kind, place in places.items() if place}
        )
    return rows


SWITCHES = {
    "llama": {"heads": "attention_bias", "channels": "mlp_bias"},
    "qwen3": {"heads": "attention_bias"},
    "gemma2": {"heads": "attention_bias"},
    "gemma3_text": {"heads": "attention_bias"},
}
"""Model types whose configuration can switch on a bias at the reader of a kind (and at its feeders)."""
EXPLICIT_HEADS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "mixtral",
    "qwen2_moe",
)
"""Model types that take the width of a head from the configuration, so that heads can be fewer."""
CHANNELS = {"gpt2": "n_inner", "opt": "ffn_dim"}
"""What the number of channels is called where it is not intermediate_size."""


def bias_switch(decoder: Decoder, kind: str) -> str | None:
    """The configuration's name for a bias at the reader of `kind`, if it has one."""
    return SWITCHES.get(decoder.config.model_type, {}).get(kind)


def plain_kinds(decoder: Decoder) -> list[str]:
    """The kinds of unit whose number, equal in all blocks, stock transformers can load."""
    return [kind for kind in WIRING if kind != "heads" or decoder.config.model_type in EXPLICIT_HEADS]


def plain_bias(decoder: Decoder, kind: str) -> bool:
    """Whether stock transformers can load a bias at the reader of `kind`, in all blocks."""
    return bias_switch(decoder, kind) is not None or site(decoder, 0, kind).reader.bias is not None


def write_config(decoder: Decoder, before: list[dict[str, Any]]) -> None:
    """Make the configuration say what shapes the model has now: plainly where stock transformers understands it."""
    rows = shapes(decoder)
    wrapped = hasattr(decoder.config, "tprune")
    if rows != before and (wrapped or not _plainly(decoder, before, rows)):
        decoder.config.tprune = {"layers": rows}


def _plainly(decoder: Decoder, before: list[dict[str, Any]], rows: list[dict[str, Any]]) -> bool:
    """Write equal shapes into the configuration; False where they are not equal, or it has no words for them."""
    if any(row != rows[0] for row in rows):
        return False
    changes = []
    for kind, (count, bias) in rows[0].items():
        old, had_bias = before[0][kind]
        if (count != old and kind not in plain_kinds(decoder)) or (
            bias != had_bias and bias_switch(decoder, kind) is None
        ):
            return False
        changes.append((kind, count, count != old, bias != had_bias))
    for kind, count, resized, biased in changes:
        if resized:
            _write_count(decoder, kind, count)
        if biased:
            _write_bias(decoder, kind)
    return True


def _write_count(decoder: Decoder, kind: str, count: int) -> None:
    config, place = decoder.config, site(decoder, 0, kind)
    if kind == "channels":
        setattr(config, CHANNELS.get(config.model_type, "intermediate_size"), count)
    else:
        config.head_dim = place.width // place.heads
        config.num_attention_heads, config.num_key_value_heads = count * place.heads, count


def _write_bias(decoder: Decoder, kind: str) -> None:
    """Switch the biases of a kind on; feeders that had none get zeros."""
    setattr(decoder.config, bias_switch(decoder, kind), True)
    for index in range(len(decoder.blocks)):
        for module in site(decoder, index, kind).feeds.values():
            if module.bias is None:
                _add_bias(module, torch.zeros(width(module)[0]))


def resize(decoder: Decoder, rows: list[dict[str, Any]]) -> None:
    """Give a freshly built model (its weights do not matter) the shapes of `rows`."""
    for index, row in enumerate(rows):
        for kind, (count, bias) in row.items():
            place = site(decoder, index, kind)
            if count != place.count:
                _shrink(decoder, index, place, torch.arange(count, device="cpu"))
            if bias and place.reader.bias is None:
                empty = torch.empty(width(place.reader)[0], device=place.reader.weight.device)
                _replace(place.reader, "bias", empty.to(place.reader.weight.dtype))


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer stores its weight [in, out]."""
    return isinstance(module, Conv1D)
