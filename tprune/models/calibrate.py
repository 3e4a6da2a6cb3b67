"""Block-by-block calibration: one buffer of activations goes through the model, one block at a time.

The inputs of the first block and the arguments of every block (masks, positions: Gemma's differ from layer to
layer) are noted once, without running a block. Then each block may be run as often as a method needs, with its
statistics gathered at the inputs of its linear layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from math import pi
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tprune.core.statistics import KINDS, PER_CHANNEL, Inputs, token_cosine
from tprune.models.blocks import Decoder
from tprune.models.inputs import LastInput, Watch
from tprune.models.pages import at_hand
from tprune.models.spill import Spilled
from tprune.models.subject import pages_of
from tprune.models.threads import side_by_side

TOKENS_AT_ONCE = {"cpu": 512}
"""At most so many tokens go through a block together (at least one sequence): on a CPU more hardly run faster, and
what a block computes inside takes several times its input. Every worker has as many."""
MANY_TOKENS = 4096
"""The same on any other device, which wants more to be busy."""


def rows_at_once(batch_size: int, length: int, device: torch.device | str) -> int:
    """How many sequences of `length` tokens go through a block together: `batch_size`, or fewer."""
    tokens = TOKENS_AT_ONCE.get(torch.device(device).type, MANY_TOKENS)
    return max(1, min(batch_size, tokens // length))


def workers_at_once(batch_size: int, rows: int, tokens: tuple[int, int], device: torch.device | str) -> int:
    """How many threads may each send `rows` sequences through a block, of `tokens` (N, L) in all.

    On a CPU one for each of torch's threads, while they have at most `batch_size` sequences and `MANY_TOKENS` tokens
    between them; on any other device a single one.
    """
    if torch.device(device).type != "cpu":
        return 1
    together = min(batch_size, MANY_TOKENS // tokens[1], tokens[0]) // rows
    return max(1, min(torch.get_num_threads(), together))


class Stream:
    """The calibration sequences between two blocks.

    Attributes:
        decoder: the model they go through.
        tokens: int64 [N, L], the sequences themselves.
        hidden: [N, L, D], inputs of the coming block; `Spilled` where they are in a file.
        rows: how many sequences go through a block together.
        workers: how many threads send sequences through a block at the same time.
        join: what is called with the statistics of a pass, where other processes have the rest of the sequences.
    """

    join: Callable[[Iterable[Inputs]], None] | None = None
    workers = 1

    def __init__(self, decoder: Decoder, tokens: Tensor, batch_size: int, spill: Path | None = None):
        """Embed `tokens` int64 [N, L]; runs no block. `spill` is a folder for activations that leave memory."""
        self.decoder, self.tokens = decoder, tokens
        device = next(decoder.core.parameters()).device
        self.rows = rows_at_once(batch_size, tokens.shape[1], device)
        # Accelerate's hooks, pages and a file serve one at a time.
        hooked = any(hasattr(module, "_hf_hook") for module in decoder.blocks.modules())
        if spill is None and pages_of(decoder.model) is None and not hooked:
            self.workers = workers_at_once(batch_size, self.rows, tuple(tokens.shape), device)
        self._arguments: dict[tuple[int, int], tuple[tuple, dict[str, Any]]] = {}
        self.hidden: Tensor | Spilled = torch.empty(0)
        parts: list[Tensor] = []
        with _noting(decoder, parts, self._arguments), torch.no_grad():
            for place, chunk in enumerate(tokens.split(self.rows)):
                decoder.core(input_ids=chunk.to(device), use_cache=False)
                part = parts.pop()
                if place == 0:
                    shape = torch.Size((len(tokens), *part.shape[1:]))
                    self.hidden = (
                        part.new_empty(shape)
                        if spill is None
                        else Spilled(spill, shape, part.dtype, part.device)
                    )
                self._keep(place, part)

    def again(self) -> Stream:
        """The same sequences before the first block, in a stream of their own."""
        return Stream(self.decoder, self.tokens, self.rows * self.workers)

    def arguments(self, index: int, size: int) -> tuple[tuple, dict[str, Any]]:
        """What block `index` is called with beside the hidden states of `size` sequences."""
        if (index, size) not in self._arguments:
            device = next(self.decoder.core.parameters()).device
            with _noting(self.decoder, [], self._arguments), torch.no_grad():
                self.decoder.core(input_ids=self.tokens[:size].to(device), use_cache=False)
        return self._arguments[index, size]

    def run(self, index: int, x: Tensor) -> Tensor:
        """Block `index` on the hidden states x [b, L, D]."""
        positional, named = self.arguments(index, x.shape[0])
        out = self.decoder.blocks[index](x, *positional, **named)
        return out[0] if isinstance(out, tuple) else out

    def _keep(self, place: int, hidden: Tensor) -> None:
        """Put the hidden states of the batch at `place` where they belong."""
        if isinstance(self.hidden, Spilled):
            self.hidden.write(place * self.rows, hidden)
        else:
            self.hidden[place * self.rows :][: len(hidden)] = hidden

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Send all sequences through block `index` as it stands."""
        coming = enumerate(self.hidden.split(self.rows))

        def work(worker: int) -> None:
            for place, x in coming:  # whoever is free takes the next
                self._keep(place, self.run(index, x))

        with at_hand(self.decoder, index):
            self._know(index, len(self.hidden))
            side_by_side(work, self.workers)

    def _know(self, index: int, sequences: int) -> None:
        """Note the arguments of block `index` for batches of so many sequences, before workers ask for them."""
        for size in {min(self.rows, sequences), sequences % self.rows or self.rows}:
            self.arguments(index, size)

    @torch.no_grad()
    def gather(
        self,
        index: int,
        kinds: tuple[str, ...],
        names: list[str] | None = None,
        chosen: Tensor | None = None,
    ) -> dict[str, Inputs]:
        """Statistics of the inputs in block `index`, which stops at the last of them; the stream stays before it.

        Args:
            index: which block.
            kinds: names in `tprune.core.statistics.KINDS`.
            names: of the modules to look at, all with a prunable matrix by default.
            chosen: int64, which sequences; all by default.

        Returns:
            By the name of a matrix's `input`; modules with the same input share one object.
        """
        hidden = self.hidden if chosen is None else self.hidden[chosen]
        # What is as large as a matrix is not gathered by several.
        count = self.workers if set(kinds) & KINDS.keys() <= PER_CHANNEL else 1
        count = min(count, -(-len(hidden) // self.rows))
        with at_hand(self.decoder, index), ExitStack() as stack:
            watches = [stack.enter_context(Watch(self.decoder, index, kinds, names)) for _ in range(count)]

            def work(worker: int) -> None:
                for place, x in enumerate(hidden.split(self.rows)):
                    if place % count == worker:  # always the same ones: sums depend on their order
                        watches[worker].begin(len(x), stop=True)
                        with suppress(LastInput):
                            self.run(index, x)
                watches[worker].end()

            self._know(index, len(hidden))
            side_by_side(work, count)
        return self._joined(_united([watch.inputs for watch in watches]))

    def _joined(self, inputs: dict[str, Inputs]) -> dict[str, Inputs]:
        """The statistics of all processes' sequences; modules with the same input share one object."""
        if self.join is not None:
            self.join(dict.fromkeys(inputs.values()))
        return inputs

    @torch.no_grad()
    def gather_and_advance(
        self, index: int, kinds: tuple[str, ...], names: list[str] | None = None
    ) -> tuple[dict[str, Inputs], dict[str, float]]:
        """Statistics of block `index` and its outputs in one pass, for methods that propagate dense activations.

        Returns:
            The statistics as in `gather`; and where `kinds` has them, means over all tokens between before and after
            the block: "similarity", of their cosine, and "angle", of their angle as a part of π.
        """
        turned = {kind: 0.0 for kind in ("similarity", "angle") if kind in kinds}
        with at_hand(self.decoder, index), Watch(self.decoder, index, kinds, names) as watch:
            for place, x in enumerate(self.hidden.split(self.rows)):
                watch.begin(len(x), stop=False)
                out = self.run(index, x)
                if turned:
                    cosine = token_cosine(x, out)
                    parts = {"similarity": cosine, "angle": cosine.clamp(-1, 1).acos() / pi}
                    turned = {kind: total + parts[kind].double().sum() for kind, total in turned.items()}
                self._keep(place, out)
        tokens = self.hidden.shape[0] * self.hidden.shape[1]
        return self._joined(watch.inputs), {kind: total.item() / tokens for kind, total in turned.items()}


def _noting(
    decoder: Decoder, parts: list[Tensor], arguments: dict[tuple[int, int], tuple[tuple, dict[str, Any]]]
) -> AbstractContextManager[None]:
    """Every block answers with its own input and notes what it was called with, per batch size.

    All sequences have the same length and no padding, so the arguments depend on nothing else.
    """

    def stand_in(index: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *positional: Any, **named: Any) -> Tensor:
            arguments.setdefault((index, hidden_states.shape[0]), (positional, named))
            if index == 0:
                parts.append(hidden_states)
            return hidden_states

        return forward

    return standing_in(decoder, stand_in)


def answering(decoder: Decoder, hidden: Tensor) -> AbstractContextManager[None]:
    """Whatever goes in, `hidden` [B, L, D] leaves the last block: what follows up to the logits is the model's own."""
    return standing_in(decoder, lambda index: lambda *positional, **named: hidden)


@contextmanager
def standing_in(decoder: Decoder, stand_in: Callable[[int], Callable[..., Tensor]]) -> Iterator[None]:
    """Block i runs `stand_in(i)` instead of its own forward."""
    own = [
        vars(block).get("forward") for block in decoder.blocks
    ]  # accelerate leaves one on a dispatched block
    try:
        for index, block in enumerate(decoder.blocks):
            block.forward = stand_in(index)
        yield
    finally:
        for block, forward in zip(decoder.blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _united(parts: list[dict[str, Inputs]]) -> dict[str, Inputs]:
    """The statistics of several workers as if one had gathered them; a module need not have run for all of them."""
    found: dict[str, Inputs] = {}
    for part in parts:
        for name, inputs in part.items():
            found.setdefault(name, inputs)
    if len(parts) > 1:
        for inputs, name in {inputs: name for name, inputs in found.items()}.items():
            inputs.join([part[name].share() for part in parts if name in part])
    return found
