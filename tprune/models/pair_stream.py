"""Block-by-block calibration of an encoder with a decoder beside it: first the one's blocks, then the other's.

The decoder's blocks read what the encoder, pruned by then, made of the first half of every sequence. No sequence has
padding, so every token counts in the statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tprune.core.statistics import Inputs
from tprune.models.blocks import Decoder
from tprune.models.calibrate import Stream
from tprune.models.encoder_decoder import EncoderDecoder, halves
from tprune.models.feed import Feed
from tprune.models.standing_in import standing_in

READ = "encoder_hidden_states"
"""How transformers calls what a decoder's block reads of the encoder."""


class PairStream(Stream):
    """Calibration sequences on their way through two stacks.

    Attributes:
        decoder: both stacks.
        hidden: [N, L, D]: in front the encoder's states of the first half of each sequence, behind its last block what
            the decoder reads of them; at the end the decoder's states of the second half, embedded until its first
            block.
    """

    decoder: EncoderDecoder

    def __init__(
        self,
        decoder: EncoderDecoder,
        sequences: Tensor | Feed,
        batch_size: int,
        spill: Path | None = None,
    ):
        self._beside: dict[tuple[int, int], tuple[Any, ...] | None] = {}
        super().__init__(decoder, sequences, batch_size, spill)

    @torch.no_grad()
    def _enter(self, part: slice) -> Tensor:
        """The embedded halves of some sequences side by side; no block runs but, once, the first of each stack."""
        parts: list[Tensor] = []
        with standing_in(self.decoder, lambda index: self._note(index, parts)):
            self.decoder.send(self.tokens[part])
        return torch.cat(parts, 1)

    def _note(self, index: int, parts: list[Tensor]) -> Callable[..., Any]:
        """What stands in for a block, notes its arguments, and the states that enter a stack in `parts`.

        T5's first block makes the bias of positions that it hands on to all others of its stack: it has to run.
        """
        own = self.decoder.blocks[index].forward
        names = list(signature(type(self.decoder.blocks[index]).forward).parameters)[2:]

        def forward(hidden_states: Tensor, *positional: Any, **named: Any) -> Any:
            size = len(hidden_states)
            given = dict(zip(names, positional, strict=False)) | named
            if index in self.decoder.entrances:
                parts.append(hidden_states)
                if (index, size) not in self._beside:
                    out = own(hidden_states, **given)
                    self._beside[index, size] = out[1:] if isinstance(out, tuple) else None
            given.pop(READ, None)
            self._arguments.setdefault((index, size, 0), ((), given))
            return self._answer(index, hidden_states)

        return forward

    def _answer(self, index: int, hidden: Tensor) -> Any:
        """Hidden states [b, ·, D] as a block of the stack gives them back, with what goes along."""
        beside = self._beside[self.decoder.entrance(index), len(hidden)]
        return hidden if beside is None else (hidden, *beside)

    def answering(self, hidden: Tensor) -> AbstractContextManager[None]:
        """Whatever goes in, of `hidden` [b, L, D] each stack's own part leaves its last block."""
        parts = halves(hidden)

        def stand_in(index: int) -> Callable[..., Any]:
            part = parts[index >= self.decoder.entrances[1]]
            return lambda *positional, **named: self._answer(index, part)

        return standing_in(self.decoder, stand_in)

    def run(self, index: int, x: Tensor, first: int = 0) -> Tensor:
        """Block `index` on the states of both stacks x [b, L, D], of which one's stay."""
        _, named = self.arguments(index, len(x), first)
        read, said = halves(x)
        block = self.decoder.blocks[index]
        if index < self.decoder.entrances[1]:
            read = _states(block(read, **named))
        else:
            said = _states(block(said, **{READ: read}, **named))
        return torch.cat([read, said], 1)

    def advance_whole(self, index: int) -> None:
        """Send all sequences through block `index` as it stands."""
        super().advance_whole(index)
        self._close(index)

    def gather_and_advance(
        self, index: int, kinds: tuple[str, ...], names: list[str] | None = None
    ) -> tuple[dict[str, Inputs], dict[str, float]]:
        """Statistics of block `index` and its outputs in one pass."""
        found = super().gather_and_advance(index, kinds, names)
        self._close(index)
        return found

    @torch.no_grad()
    def _close(self, index: int) -> None:
        """Behind the encoder's last block: what the encoder itself makes of the states there (T5's last norm)."""
        if index + 1 != self.decoder.entrances[1]:
            return
        for first, x in self.batches():
            read, said = halves(x)
            ids = halves(self.tokens[first : first + len(x)])[0].to(x.device)
            with self.answering(x):
                read = self.decoder.encoder(input_ids=ids).last_hidden_state
            self._keep(first, torch.cat([read, said], 1))


def stream_of(
    decoder: Decoder, sequences: Tensor | Feed, batch_size: int, spill: Path | None = None
) -> Stream:
    """Sequences, tokens int64 [N, L] or other samples, before the first block, whatever the blocks are of."""
    kind = PairStream if isinstance(decoder, EncoderDecoder) else Stream
    return kind(decoder, sequences, batch_size, spill)


def _states(out: Any) -> Tensor:
    """The hidden states among what a block gives back."""
    return out[0] if isinstance(out, tuple) else out
