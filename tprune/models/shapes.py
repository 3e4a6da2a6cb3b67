"""The shapes of a pruned decoder in its configuration, and back.

Equal widths in all blocks and fewer blocks are said in the configuration's own words, which stock transformers
loads. Different widths are listed per block in a `tprune` section, from which `resize` gives a freshly built
model the same shapes before its weights are loaded.
"""

from __future__ import annotations

from dataclasses import astuple, replace
from math import inf, nextafter
from typing import Any

import torch

from tprune.core.weights import HALVES, Shared, StructureEdit
from tprune.models.blocks import Decoder, width
from tprune.models.experts import KIND, keep_experts
from tprune.models.halves import halves_gone, keeps_norms, remove_half
from tprune.models.shared import borrows, make_room, share
from tprune.models.units import WIRING, add_bias, put, remove_blocks, set_weight, shrink, site


def apply(decoder: Decoder, edits: list[StructureEdit]) -> None:
    """Carry out the edits in the model and in its configuration."""
    before = shapes(decoder)
    edits = settled(decoder, edits)
    keep_experts(decoder, edits)
    for edit in edits:
        for kind in edit.keep.keys() - {KIND}:
            place = site(decoder, edit.block, kind)
            shrink(decoder, edit.block, place, edit.keep[kind])
        for kind in edit.weight.keys() - {KIND}:
            set_weight(site(decoder, edit.block, kind).reader, edit.weight[kind])
        for kind, bias in edit.bias.items():
            add_bias(site(decoder, edit.block, kind).reader, bias)
        for half in edit.halves:
            remove_half(decoder.blocks[edit.block], half)
        if edit.shared is not None:
            share(decoder, edit.block, edit.shared)
    gone = sorted(edit.block for edit in edits if edit.removed)
    if gone:
        remove_blocks(decoder, gone)
    write_config(decoder, [row for index, row in enumerate(before) if index not in gone])


def settled(decoder: Decoder, edits: list[StructureEdit]) -> list[StructureEdit]:
    """The edits, where a block without both halves is removed, unless norms are left of it."""
    return [
        replace(edit, removed=True)
        if set(edit.halves) == set(HALVES) and not keeps_norms(decoder.blocks[edit.block])
        else edit
        for edit in edits
    ]


def shapes(decoder: Decoder) -> list[dict[str, Any]]:
    """Per block, how many units of each kind there are, whether their reader has a bias, and which halves are gone."""
    rows = []
    for index, block in enumerate(decoder.blocks):
        places = {kind: site(decoder, index, kind) for kind in WIRING}
        row: dict[str, Any] = {
            kind: [place.count, place.reader.bias is not None] for kind, place in places.items() if place
        }
        gone = halves_gone(block)
        row |= {GONE: gone} if gone else {}
        how = borrows(decoder, index)
        rows.append(row if how is None else row | {SHARED: list(astuple(how))})
    return rows


GONE = "gone"
"""The name of the missing halves in a row of the table."""
SHARED = "shared"
"""The name of what `Shared` says in a row of the table."""


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
    "vit",
    "deit",
    "dinov2",
    "dinov2_with_registers",
)
"""Model types that take the width of a head from the configuration, so that heads can be fewer."""
CHANNELS = {
    "gpt2": "n_inner",
    "opt": "ffn_dim",
    "distilbert": "hidden_dim",
    "VisionTransformer": "mlp_ratio",
    "VisionTransformerDistilled": "mlp_ratio",
}
"""What the number of channels is called where it is not intermediate_size; a ratio is to the hidden size."""
NO_CHANNELS = (
    "dinov2",
    "dinov2_with_registers",
    "pixio",
    "radio",
    "tipsv2_vision_model",
    "vitdet",
    "siglip_vision_model",
    "siglip2_vision_model",
    "Eva",
)
"""Model types whose configuration takes whole multiples of the hidden size alone (DINOv2 and its kin, ViTDet), means
other layers, too (SigLIP's head), or goes by other rules."""


def bias_switch(decoder: Decoder, kind: str) -> str | None:
    """The configuration's name for a bias at the reader of `kind`, if it has one."""
    return SWITCHES.get(decoder.config.model_type, {}).get(kind)


def plain_kinds(decoder: Decoder) -> list[str]:
    """The kinds of unit whose number, equal in all blocks, stock transformers can load."""
    name = decoder.config.model_type
    told = {"heads": name in EXPLICIT_HEADS, "channels": name not in NO_CHANNELS}
    return [kind for kind in WIRING if told[kind]]


def plain_bias(decoder: Decoder, kind: str) -> bool:
    """Whether stock transformers can load a bias at the reader of `kind`, in all blocks."""
    return bias_switch(decoder, kind) is not None or site(decoder, 0, kind).reader.bias is not None


def write_config(decoder: Decoder, before: list[dict[str, Any]]) -> None:
    """Make the configuration say what shapes the model has now: plainly where stock transformers understands it."""
    rows = shapes(decoder)
    wrapped = hasattr(decoder.config, "tprune")
    told = decoder.config.tprune.get("layers", before) if wrapped else before
    if rows != told and (wrapped or not _plainly(decoder, before, rows)):
        decoder.config.tprune = {"layers": rows}


def _plainly(decoder: Decoder, before: list[dict[str, Any]], rows: list[dict[str, Any]]) -> bool:
    """Write equal shapes into the configuration; False where they are not equal, or it has no words for them."""
    if any(row != rows[0] or GONE in row or SHARED in row for row in rows):
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
        name = CHANNELS.get(config.model_type, "intermediate_size")
        setattr(config, name, _ratio(count, config.hidden_size) if name == "mlp_ratio" else count)
    else:
        config.head_dim, config.num_attention_heads = place.width // place.heads, count * place.heads
        if hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = count


def _ratio(count: int, whole: int) -> float:
    """What `whole` is multiplied with so that it is `count`, rounded down."""
    ratio = count / whole
    return ratio if int(whole * ratio) == count else nextafter(ratio, inf)


def _write_bias(decoder: Decoder, kind: str) -> None:
    """Switch the biases of a kind on; feeders that had none get zeros."""
    setattr(decoder.config, bias_switch(decoder, kind), True)
    for index in range(len(decoder.blocks)):
        for module in site(decoder, index, kind).feeds.values():
            if module.bias is None:
                add_bias(module, torch.zeros(width(module)[0]))


def restore(decoder: Decoder, rows: list[dict[str, Any]]) -> None:
    """Give a freshly built model the shapes of `rows`, and let its configuration say so."""
    resize(decoder, rows)
    decoder.config.tprune = {"layers": rows}


def resize(decoder: Decoder, rows: list[dict[str, Any]]) -> None:
    """Give a freshly built model (its weights do not matter) the shapes of `rows`."""
    for index, row in enumerate(rows):
        for half in row.get(GONE, ()):
            remove_half(decoder.blocks[index], half)
        own = rows[row[SHARED][0]] if SHARED in row else row  # who borrows has the shape of the other
        for kind, (count, bias) in ((kind, own[kind]) for kind in WIRING if kind in own):
            place = site(decoder, index, kind)
            if count != place.count:
                shrink(decoder, index, place, torch.arange(count, device="cpu"))
            if bias and place.reader.bias is None:
                empty = torch.empty(width(place.reader)[0], device=place.reader.weight.device)
                put(place.reader, "bias", empty.to(place.reader.weight.dtype))
    for index, row in enumerate(rows):
        if SHARED in row:
            make_room(decoder, index, Shared(*row[SHARED]))
