"""Where the decoder blocks of a transformers language model are, and the prunable matrices in them.

A matrix is found by what it is (a Linear, GPT-2's Conv1D, a 3-D parameter of experts), not by the model's name, so
that a new architecture of an existing kind needs nothing here. Fused projections count as the matrices they fuse.
Embeddings, the head, norms, biases and routers are no matrices in this sense.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tprune.errors import UserError
from tprune.models.matrix import Matrix

ROUTERS = ("gate", "router", "shared_expert_gate")
"""Last names of Linears that route tokens to experts."""
INTERLEAVED = ("gpt_neox", "gpt_neox_japanese", "bloom")
"""Model types whose `query_key_value` holds q, k and v of one head after the other."""

CHANNELS = (
    ("mlp", ("gate_proj", "up_proj"), "down_proj"),
    ("mlp", ("gate_up_proj",), "down_proj"),
    ("mlp", ("c_fc",), "c_proj"),
    ("mlp", ("dense_h_to_4h",), "dense_4h_to_h"),
    ("mlp", ("up_proj",), "down_proj"),
    ("mlp", ("fc1",), "fc2"),
    ("mlp", ("fc1_g", "fc1_x"), "fc2"),
    ("", ("fc1",), "fc2"),
    ("", ("intermediate.dense",), "output.dense"),
    ("ffn", ("lin1",), "lin2"),
    *(
        (f"layer.{place}.DenseReluDense", feeds, "wo")
        for place in (1, 2)
        for feeds in (("wi_0", "wi_1"), ("wi",))
    ),
)
"""MLPs: the submodule of a block, the projections that feed the channels, the one that reads them."""
READERS = {feed: reader for _, feeds, reader in CHANNELS for feed in feeds}


@dataclass(eq=False)
class Decoder:
    """The part of a language model that is pruned.

    Attributes:
        model: the whole model.
        core: its decoder without the head.
        config: the text model's configuration.
        blocks: the decoder blocks.
        name: the name of `blocks` in the model.
        part: which matrices count: "all", or those of the "mlp" (those that feed or read its channels).
    """

    model: nn.Module
    core: nn.Module
    config: Any
    blocks: nn.ModuleList
    name: str
    part: str = "all"

    def block_name(self, index: int) -> str:
        """The full name of a block."""
        return f"{self.name}.{index}"

    def send(self, tokens: Tensor) -> None:
        """Send texts int64 [B, L] through the blocks, without the head."""
        self.core(input_ids=tokens.to(next(self.core.parameters()).device), use_cache=False)

    def matrices(self, index: int) -> list[Matrix]:
        """The prunable matrices of one block, in the order of its modules."""
        found = []
        for name, module in self.blocks[index].named_modules(prefix=self.block_name(index)):
            if is_linear(module) and name.rpartition(".")[2] not in ROUTERS:
                found += self._linear(name, module, index)
            elif is_experts(module):
                found += _experts(name, module, index)
        inputs = {matrix.input for matrix in found}
        for matrix in found:
            matrix.reader = _reader(matrix, inputs)
        if self.part == "mlp":
            readers = {matrix.reader for matrix in found}
            found = [matrix for matrix in found if matrix.reader or matrix.input in readers]
        return found

    def inputs(self, index: int) -> dict[str, nn.Module]:
        """The modules of a block whose inputs are looked at, by name."""
        names = {matrix.parameter_name.rpartition(".")[0] for matrix in self.matrices(index)}
        modules = self.blocks[index].named_modules(prefix=self.block_name(index))
        return {name: module for name, module in modules if name in names}

    def _linear(self, name: str, module: nn.Module, index: int) -> Iterator[Matrix]:
        for suffix, rows in self._fused(name.rpartition(".")[2], module):
            yield Matrix(
                name=name + suffix,
                block=index,
                parameter=module.weight,
                parameter_name=f"{name}.weight",
                input=name,
                transposed=isinstance(module, Conv1D),
                rows=rows,
                module=module,
            )

    def _fused(self, last: str, module: nn.Module) -> list[tuple[str, Tensor | None]]:
        """(suffix, rows) of every matrix that the Linear with this last name fuses."""
        rows = torch.arange(width(module)[0], device="cpu")
        if last in ("qkv_proj", "c_attn"):
            ratio = self.config.num_attention_heads // key_value_heads(self.config)
            group = len(rows) // (ratio + 2)
            return list(zip((".q", ".k", ".v"), rows.split([ratio * group, group, group]), strict=True))
        if last == "query_key_value" and self.config.model_type in INTERLEAVED:
            heads = rows.view(-1, 3, self.config.hidden_size // self.config.num_attention_heads)
            return [(f".{part}", heads[:, place].flatten()) for place, part in enumerate("qkv")]
        if last == "qkv":
            return list(zip((".q", ".k", ".v"), rows.chunk(3), strict=True))
        if last == "gate_up_proj":
            return list(zip((".gate", ".up"), rows.chunk(2), strict=True))
        return [("", None)]


def _reader(matrix: Matrix, inputs: set[str]) -> str | None:
    """The `input` of the matrix that reads the channels which this one feeds."""
    if matrix.expert is not None:
        stack, end = matrix.input[: -len(".in")], matrix.input[-len(".in") :]
        return f"{stack}.out" if end == ".in" else None
    for feed, reader in READERS.items():
        if matrix.input.endswith(f".{feed}"):
            found = matrix.input.removesuffix(feed) + reader
            return found if found in inputs else None
    return None


def part_of(module: nn.Module, name: str) -> nn.Module | None:
    """A module's part of this name, such as "output.dense"; itself without a name, None where it has no such part."""
    for step in name.split(".") if name else ():
        module = getattr(module, step, None)
    return module


def is_linear(module: nn.Module) -> bool:
    """Whether this is a plain linear layer; quantised or wrapped ones are not."""
    return type(module) in (nn.Linear, Conv1D)


def is_experts(module: nn.Module) -> bool:
    """Whether this holds stacked experts: gate_up_proj [E, 2m, d] and down_proj [E, d, m], or transposed."""
    stacks = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    return all(isinstance(stack, nn.Parameter) and stack.dim() == 3 for stack in stacks)


def width(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def key_value_heads(config: Any) -> int:
    """How many key-value heads every block has."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _experts(name: str, module: nn.Module, index: int) -> Iterator[Matrix]:
    transposed = bool(getattr(module, "is_transposed", False))
    outputs = module.gate_up_proj.shape[2 if transposed else 1]
    rows = torch.arange(outputs, device="cpu")
    halves = rows.chunk(2) if getattr(module, "is_concatenated", True) else (rows[0::2], rows[1::2])
    for expert in range(module.gate_up_proj.shape[0]):
        common = {"block": index, "expert": expert, "transposed": transposed}
        for suffix, half in zip(("gate", "up"), halves, strict=True):
            yield Matrix(
                name=f"{name}.{expert}.{suffix}",
                parameter=module.gate_up_proj,
                parameter_name=f"{name}.gate_up_proj",
                input=f"{name}.{expert}.in",
                rows=half,
                **common,
            )
        yield Matrix(
            name=f"{name}.{expert}.down",
            parameter=module.down_proj,
            parameter_name=f"{name}.down_proj",
            input=f"{name}.{expert}.out",
            **common,
        )


def has_encoder(model: nn.Module) -> bool:
    """Whether a language model has an encoder of text beside its decoder (T5, BART)."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def check_no_encoder(model: nn.Module) -> None:
    """Refuse a decoder with an encoder beside it.

    Raises:
        UserError: naming what can be pruned of such a model.
    """
    if has_encoder(model):
        raise UserError(
            f"{type(model).__name__} has an encoder beside its decoder: such models lose weights one by one or in "
            "patterns (tprune llm-weights with wanda, sparsegpt and their kin), and nothing else"
        )


def find_decoder(model: nn.Module) -> Decoder:
    """The decoder of a transformers language model.

    Raises:
        UserError: an encoder beside it, no list of blocks, or blocks without a plain linear layer (quantised ones).
    """
    check_no_encoder(model)
    if not hasattr(model, "get_decoder") or not hasattr(model, "config"):
        raise UserError(
            f"{type(model).__name__} is no transformers language model: no decoder blocks to prune"
        )
    config = model.config.get_text_config(decoder=True)
    core = model.get_decoder()
    names = {module: name for name, module in model.named_modules()}
    for module in core.modules():
        if isinstance(module, nn.ModuleList) and len(module) == getattr(config, "num_hidden_layers", -1):
            decoder = Decoder(model, core, config, module, names[module])
            if not any(decoder.matrices(index) for index in range(len(module))):
                kinds = sorted(
                    {type(part).__name__ for part in module[0].modules() if hasattr(part, "weight")}
                )
                raise UserError(
                    f"the blocks of {type(model).__name__} hold no plain linear layers, only {', '.join(kinds)}; "
                    "unwrap adapters or dequantise the model first"
                )
            return decoder
    raise UserError(f"{type(model).__name__}: no list of decoder blocks was found in it")
