"""Block-by-block calibration: one buffer of activations goes through the model, one block at a time.

The inputs of the first block and the arguments of every block (masks, positions: Gemma's differ from layer to
layer) are noted once, without running a block. Then each block may be run as often as a method needs, with its
statistics gathered at the inputs of its linear layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from math import pi
from pathlib import Path
from threading import local
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tprune.core.statistics import KINDS, PER_CHANNEL, SHARED, Inputs, token_cosine
from tprune.models.blocks import Decoder
from tprune.models.compact import Compact, whole
from tprune.models.feed import Feed, Tokens
from tprune.models.inputs import Watch, united
from tprune.models.pages import at_hand
from tprune.models.pieces import in_pieces
from tprune.models.spill import Spilled
from tprune.models.standing_in import answering, noting
from tprune.models.subject import pages_of
from tprune.models.threads import Turns, side_by_side

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
        feed: the sequences themselves, before the model.
        hidden: [N, L, D], inputs of the coming block; `Spilled` where they are in a file. What lies behind the length
            of a shorter sequence is never read.
        rows: how many sequences go through a block together; one, where they are not alike.
        workers: how many threads send sequences through a block at the same time.
        join: what is called with the statistics of a pass, where other processes have the rest of the sequences.
    """

    join: Callable[[Iterable[Inputs]], None] | None = None
    workers = 1
    _now = local()  # `part`, a slice

    def __init__(
        self, decoder: Decoder, sequences: Tensor | Feed, batch_size: int, spill: Path | None = None
    ):
        """Embed `sequences`, tokens int64 [N, L] or a feed; runs no block. `spill`: a folder for activations."""
        self.decoder = decoder
        self.feed = Tokens(sequences) if isinstance(sequences, Tensor) else sequences
        device, shape = next(decoder.core.parameters()).device, self.feed.shape
        self.rows = rows_at_once(batch_size, shape[1], device) if self.feed.alike else 1
        # Accelerate's hooks, pages and a file serve one at a time.
        hooked = any(hasattr(module, "_hf_hook") for module in decoder.blocks.modules())
        if spill is None and pages_of(decoder.model) is None and not hooked:
            self.workers = workers_at_once(batch_size, self.rows, shape, device)
        self._arguments: dict[tuple[int, int, int], tuple[tuple, dict[str, Any]]] = {}
        self._compact = None if self.feed.alike else Compact()
        self.hidden: Tensor | Spilled = torch.empty(0)
        for first in range(0, shape[0], self.rows):
            part = self._enter(slice(first, min(first + self.rows, shape[0])))
            if first == 0:
                size = torch.Size((shape[0], part.shape[1] if self.feed.alike else shape[1], part.shape[2]))
                self.hidden = (
                    part.new_zeros(size) if spill is None else Spilled(spill, size, part.dtype, part.device)
                )
            self._keep(first, part)

    @property
    def tokens(self) -> Tensor:
        """The sequences, int64 [N, L], where they are of tokens alone."""
        return self.feed.ids

    def again(self) -> Stream:
        """The same sequences before the first block, in a stream of their own."""
        return type(self)(self.decoder, self.feed, self.rows * self.workers)

    @torch.no_grad()
    def _enter(self, part: slice) -> Tensor:
        """What some sequences, one batch, enter the first block as; what all blocks are called with is noted."""
        parts: list[Tensor] = []
        noted: dict[tuple[int, int], tuple[tuple, dict[str, Any]]] = {}
        with noting(self.decoder, parts, noted):
            self.feed.call(self.decoder, part)
        first, done = 0 if self.feed.alike else part.start, {}
        for (index, size), given in noted.items():
            kept = given if self._compact is None else self._compact.small(given, done)
            self._arguments.setdefault((index, size, first), kept)
        return parts.pop()

    def arguments(self, index: int, size: int, first: int = 0) -> tuple[tuple, dict[str, Any]]:
        """What block `index` is called with beside the hidden states of `size` sequences from number `first` on."""
        first = 0 if self.feed.alike else first
        if (index, size, first) not in self._arguments:
            self._enter(slice(first, first + size))
        given = self._arguments[index, size, first]
        return given if self._compact is None else whole(given)

    def run(self, index: int, x: Tensor, first: int = 0) -> Tensor:
        """Block `index` on the hidden states x [b, L, D] of the sequences from number `first` on."""
        self._now.part = slice(first, first + x.shape[0])
        positional, named = self.arguments(index, x.shape[0], first)
        out = self.decoder.blocks[index](x, *positional, **named)
        return out[0] if isinstance(out, tuple) else out

    @property
    def now(self) -> slice:
        """Which sequences this thread sends through a block."""
        return getattr(self._now, "part", slice(0, 0))

    def batches(self, chosen: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """What goes through a block together: the number of the first sequence, and hidden states [b, L, D].

        `chosen`, int64, says which sequences; all by default.
        """
        hidden = self.hidden if chosen is None else self.hidden[chosen]
        numbers = range(len(hidden)) if chosen is None else chosen.tolist()

        def batch(at: tuple[int, Tensor]) -> tuple[int, Tensor]:
            first, x = numbers[at[0] * self.rows], at[1]
            return first, x if self.feed.alike else x[:, : self.feed.lengths[first]]

        return map(batch, enumerate(hidden.split(self.rows)))  # no generator: several threads take from it

    def answering(self, hidden: Tensor) -> AbstractContextManager[None]:
        """As the function of this name."""
        return answering(self.decoder, hidden)

    def _keep(self, first: int, hidden: Tensor) -> None:
        """Put the hidden states of the batch from sequence `first` on where they belong."""
        if isinstance(self.hidden, Spilled):
            missing = self.hidden.shape[1] - hidden.shape[1]
            self.hidden.write(first, functional.pad(hidden, (0, 0, 0, missing)))
        else:
            self.hidden[first:][: len(hidden), : hidden.shape[1]] = hidden

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Send all sequences through block `index` as it stands."""
        with at_hand(self.decoder, index), self._small(index, self.workers):
            self.advance_whole(index)

    @torch.no_grad()
    def advance_whole(self, index: int) -> None:
        """The same for whoever looks at its modules, which never see pieces of a sequence."""
        coming = self.batches()

        def work(worker: int) -> None:
            for first, x in coming:  # whoever is free takes the next
                self._keep(first, self.run(index, x, first))

        with at_hand(self.decoder, index):
            self._know(index, len(self.hidden))
            side_by_side(work, self.workers)

    def _small(self, index: int, workers: int) -> AbstractContextManager[None]:
        """Inside, several workers in block `index` hold hardly more at once than a single one would."""
        return in_pieces(self.decoder.blocks[index]) if workers > 1 else nullcontext()

    def _know(self, index: int, sequences: int) -> None:
        """Note the arguments of block `index` for batches of so many sequences, before workers ask for them."""
        if self.feed.alike:
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
        sequences = len(self.hidden) if chosen is None else len(chosen)
        sums = set(kinds) & KINDS.keys()
        count = min(self.workers, -(-sequences // self.rows)) if sums <= set(SHARED) else 1
        # What is as large as a matrix is there once for all of them.
        turns, inputs = None if count == 1 or sums <= PER_CHANNEL else Turns(), {}
        with at_hand(self.decoder, index), self._small(index, count), ExitStack() as stack:
            watches = [
                stack.enter_context(
                    Watch(self.decoder, index, kinds, names, inputs if turns else None, turns)
                )
                for _ in range(count)
            ]

            def work(worker: int) -> None:
                for place, (first, x) in enumerate(self.batches(chosen)):
                    if place % count == worker:  # always the same ones: sums depend on their order
                        with watches[worker].batch(place, len(x)):
                            self.run(index, x, first)
                watches[worker].end()

            self._know(index, sequences)
            side_by_side(work, count)
        return self._joined(inputs if turns else united([watch.inputs for watch in watches]))

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
        turned, tokens = {kind: 0.0 for kind in ("similarity", "angle") if kind in kinds}, 0
        with at_hand(self.decoder, index), Watch(self.decoder, index, kinds, names) as watch:
            for first, x in self.batches():
                watch.begin(len(x))
                out = self.run(index, x, first)
                if turned:
                    cosine = token_cosine(x, out)
                    parts = {"similarity": cosine, "angle": cosine.clamp(-1, 1).acos() / pi}
                    turned = {kind: total + parts[kind].double().sum() for kind, total in turned.items()}
                    tokens += cosine.numel()
                self._keep(first, out)
        return self._joined(watch.inputs), {kind: total.item() / tokens for kind, total in turned.items()}
