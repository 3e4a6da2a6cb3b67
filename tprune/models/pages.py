"""A model larger than memory: its decoder blocks are read from safetensors shards when they run, and let go afterwards.

A block that is not at hand keeps its parameters, shapes and all, without memory behind them. Of the embedding and the
head, which are never whole in memory, forwards read what they need (`tprune.models.in_file`). The rest stays in memory:
norms, tables of positions, embeddings that do more than to look up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tprune.errors import UserError
from tprune.models import in_file, masks
from tprune.models.blocks import Decoder
from tprune.models.in_file import InFile
from tprune.models.memory import give_back
from tprune.models.shards import Shards, write
from tprune.models.subject import pages_of

FILE, INDEX = "model-{:05}-of-{:05}.safetensors", "model.safetensors.index.json"


class Pages:
    """The blocks of a decoder, at hand while somebody holds them.

    Args:
        decoder: its model has just been built, on the meta device.
        shards: the weights.
        device, dtype: where and in which precision they are wanted.

    Attributes:
        edits: of blocks that were pruned: what reads the record of their edits, carried out at every reading.
    """

    def __init__(self, decoder: Decoder, shards: Shards, device: str, dtype: torch.dtype):
        self.decoder, self.shards, self.edits = decoder, shards, {}
        self._holders = [0] * len(decoder.blocks)
        self._prefix = decoder.model.base_model_prefix
        decoder.model.tie_weights()  # so that it is known who shares a parameter
        inside = {id(parameter) for parameter in decoder.blocks.parameters()}
        stays = in_file.able(decoder.model) - inside
        for name, parameter in list(decoder.model.named_parameters()):
            if id(parameter) in inside:
                self._stored(name)
                real = torch.empty(parameter.shape, dtype=dtype, device=device)
                real.untyped_storage().resize_(0)
            elif self._find(name) is None:
                continue  # tied to another one
            elif id(parameter) in stays:
                real = InFile(shards, self._find(name), parameter.shape, dtype, device)
            else:
                real = torch.empty(parameter.shape, dtype=dtype, device=device)
                shards.read(self._find(name), real)
            _put(decoder.model, name, nn.Parameter(real, requires_grad=False))
        decoder.model.tie_weights()
        for name, tensor in decoder.model.named_parameters():
            if tensor.is_meta:
                self._stored(name)
        for name, buffer in list(decoder.model.named_buffers()):
            if self._find(name) is not None:
                shards.read(self._find(name), buffer)
        decoder.model.to(device=device, dtype=dtype)
        in_file.run_in_place(decoder.model)
        for index, block in enumerate(decoder.blocks):
            block.forward = self._held_while(index, block.forward)
        decoder.model.tprune_pages = self

    def _find(self, name: str) -> str | None:
        """The name in the shards; checkpoints of bare decoders lack the model's prefix."""
        bare = name.removeprefix(f"{self._prefix}.")
        return next((one for one in (name, bare) if one in self.shards), None)

    def _stored(self, name: str) -> str:
        """The same of one that must be there.

        Raises:
            UserError: it is not.
        """
        found = self._find(name)
        if found is None:
            raise UserError(
                f"--max-memory: the shards hold no {name}, as models do that are converted while they are loaded; "
                "leave --max-memory out"
            )
        return found

    def _held_while(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The block's forward with the block at hand."""

        def run(*positional: Any, **named: Any) -> Any:
            with self.held(index):
                return forward(*positional, **named)

        return run

    @contextmanager
    def held(self, index: int) -> Iterator[None]:
        """The weights of block `index`, pruned if it was, are at hand in here; those of nested calls are the same."""
        self._holders[index] += 1
        try:
            if self._holders[index] == 1:
                self._fill(index)
            yield
        finally:
            self._holders[index] -= 1
            if self._holders[index] == 0:
                for parameter in self.decoder.blocks[index].parameters():
                    parameter.untyped_storage().resize_(0)
                give_back()

    def _fill(self, index: int) -> None:
        for name, parameter in self._parameters(index):
            parameter.untyped_storage().resize_(parameter.numel() * parameter.element_size())
            self.shards.read(self._stored(name), parameter.data)
        if index in self.edits:
            masks.replay(self.decoder.matrices(index), self.edits[index]())

    def _parameters(self, index: int) -> Iterator[tuple[str, Tensor]]:
        return self.decoder.blocks[index].named_parameters(prefix=self.decoder.block_name(index))

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters with their names, in the model's order, those of a block while it is at hand; `InFile` where
        they are never whole.
        """
        blocks = self.decoder.blocks
        place = {id(tensor): index for index, block in enumerate(blocks) for tensor in block.parameters()}
        named = self.decoder.model.named_parameters()
        for index, together in groupby(named, lambda pair: place.get(id(pair[1]))):
            with nullcontext() if index is None else self.held(index):
                yield from together

    @property
    def outside(self) -> int:
        """Bytes that are held outside the blocks: parameters, and the tile of what is in a file."""
        inside = {id(parameter) for parameter in self.decoder.blocks.parameters()}
        others = [one for one in self.decoder.model.parameters() if id(one) not in inside]
        tile = max((one.tile for one in others if isinstance(one, InFile)), default=0)
        return tile + sum(one.nbytes for one in others if not isinstance(one, InFile))

    def save(self, folder: Path) -> None:
        """Write weights and configuration as transformers' own loader reads them: a shard per block, one beside."""
        blocks, model = len(self.decoder.blocks), self.decoder.model
        places: dict[str, str] = {}
        total = 0
        for shard in range(blocks + 1):
            with self.held(shard - 1) if shard else nullcontext():
                tensors = self._content(shard - 1) if shard else self._outside()
                file = FILE.format(shard + 1, blocks + 1)
                write(folder / file, tensors, in_file.pieces)
                places |= dict.fromkeys(tensors, file)
                total += sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)

    def _content(self, index: int) -> dict[str, Tensor]:
        return self.decoder.blocks[index].state_dict(prefix=f"{self.decoder.block_name(index)}.")

    def _outside(self) -> dict[str, Tensor]:
        """Parameters, of tied ones the first, and buffers that are stored."""
        model = self.decoder.model
        again = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        again -= {name for name, _ in model.named_parameters()}
        inside = tuple(f"{self.decoder.block_name(index)}." for index in range(len(self.decoder.blocks)))
        return {
            name: tensor
            for name, tensor in model.state_dict().items()
            if not name.startswith(inside) and name not in again
        }


def at_hand(decoder: Decoder, index: int) -> AbstractContextManager[None]:
    """A block's weights are in memory in here, whether the model is paged or not."""
    pages = pages_of(decoder.model)
    return nullcontext() if pages is None else pages.held(index)


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, last = name.rpartition(".")
    setattr(model.get_submodule(module), last, parameter)
