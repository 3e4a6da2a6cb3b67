"""Language models with an encoder beside their decoder (T5, BART): their two stacks of blocks, and what each is fed.

Of a text of L tokens the encoder reads the first half, and the decoder is asked to go on with the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tprune.errors import UserError
from tprune.models.blocks import Decoder, has_encoder


@dataclass(eq=False, kw_only=True)
class EncoderDecoder(Decoder):
    """The blocks of both stacks, the encoder's first.

    Attributes:
        core: the decoder's stack without the head.
        encoder: the encoder's stack.
        entrances: indices of the first blocks of both.
        names: of the lists of blocks in the model, the encoder's first.
    """

    encoder: nn.Module
    entrances: tuple[int, int]
    names: tuple[str, str]

    def entrance(self, index: int) -> int:
        """The first block of the stack that block `index` stands in."""
        return self.entrances[index >= self.entrances[1]]

    def block_name(self, index: int) -> str:
        """The full name of a block."""
        first = self.entrance(index)
        return f"{self.names[self.entrances.index(first)]}.{index - first}"

    def send(self, tokens: Tensor) -> None:
        """Send texts int64 [B, L] through both stacks, without the head."""
        given = fed(self.model, tokens.to(next(self.core.parameters()).device))
        read = self.encoder(input_ids=given["input_ids"]).last_hidden_state
        self.core(input_ids=given["decoder_input_ids"], encoder_hidden_states=read, use_cache=False)


def find_pair(model: nn.Module) -> EncoderDecoder:
    """The blocks of an encoder and of the decoder beside it.

    Raises:
        UserError: one without a single list of blocks, or different widths.
    """
    stacks = model.get_encoder(), model.get_decoder()
    names = {module: name for name, module in model.named_modules()}
    lists = [[part for part in stack.children() if isinstance(part, nn.ModuleList)] for stack in stacks]
    widths = [getattr(stack.config, "hidden_size", None) for stack in stacks]
    if any(len(found) != 1 for found in lists) or len(set(widths)) != 1:
        raise UserError(
            f"{type(model).__name__}: an encoder and a decoder of one width, each with one list of blocks, are pruned, "
            "such as T5's or BART's"
        )
    (encoder,), (decoder,) = lists
    return EncoderDecoder(
        model=model,
        core=stacks[1],
        config=model.config,
        blocks=nn.ModuleList([*encoder, *decoder]),
        name=names[decoder],
        encoder=stacks[0],
        entrances=(0, len(encoder)),
        names=(names[encoder], names[decoder]),
    )


def halves(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What the encoder reads of texts int64 [B, L], and what the decoder is to say: [B, ⌊L/2⌋] and the rest."""
    middle = tokens.shape[1] // 2
    return tokens[:, :middle], tokens[:, middle:]


def fed(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """What a language model is called with so that it foretells texts int64 [B, L], all of it or the second half.

    Raises:
        UserError: a decoder beside an encoder, of which it is not known with which token it starts.
    """
    if not has_encoder(model):
        return {"input_ids": tokens}
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        raise UserError(
            f"the configuration of this {type(model).__name__} has no decoder_start_token_id; set it, since the "
            "decoder's first token depends on it"
        )
    read, said = halves(tokens)
    return {
        "input_ids": read,
        "decoder_input_ids": torch.cat([torch.full_like(said[:, :1], start), said[:, :-1]], 1),
    }


def foretold(model: nn.Module, tokens: Tensor) -> Tensor:
    """The labels that go with `fed`: of texts int64 [B, L] what is foretold."""
    return halves(tokens)[1].contiguous() if has_encoder(model) else tokens
