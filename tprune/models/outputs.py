"""What is looked at in the outputs of a block's matrices while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from tprune.core import cosine
from tprune.core.adaptive import likenesses
from tprune.core.statistics import Inputs
from tprune.errors import UserError
from tprune.methods.selective import SelectiveMethod
from tprune.models.ahead import attention_of
from tprune.models.calibrate import Stream
from tprune.models.matrix import Matrix
from tprune.models.pages import at_hand
from tprune.models.taps import AttentionCall, Tap

See = Callable[[Matrix, Tensor, Tensor], None]
"""Is given a matrix, its inputs [b, L, C] and its outputs [b, L, R]."""


def likeness_and_advance(stream: Stream, index: int) -> dict[str, tuple[float, ...]]:
    """How alike the outputs of each matrix of block `index` are within a sequence, by its name; the stream passes it.

    The means over sequences of `core.adaptive.likenesses`, without those that no sequence has.

    Raises:
        UserError: experts are stacked, so that their outputs are not seen.
    """
    noted: dict[str, list[Tensor]] = {}

    def see(matrix: Matrix, x: Tensor, y: Tensor) -> None:
        alike = likenesses(cosine.among(y, eps=1e-12), _visual(stream, y.device))
        noted.setdefault(matrix.name, []).append(alike)

    with _watching(stream, index, see, "--allocate tamp-das"):
        stream.advance_whole(index)
    found = {}
    for name, parts in noted.items():
        terms = torch.cat(parts).double().sort(0).values.nanmean(0)  # batches come in any order
        found[name] = tuple(terms[~terms.isnan()].tolist())
    return found


@torch.no_grad()
def gather_selected(stream: Stream, index: int, method: SelectiveMethod) -> dict[str, Inputs]:
    """Norms of the inputs of a block's matrices over the tokens that `method` selects, by the matrices' names.

    The stream stays before the block.

    Raises:
        UserError: stacked experts, or an attention that cannot be watched.
    """
    found: dict[str, Inputs] = {}
    seen: list[tuple[Matrix, Tensor, Tensor]] = []
    calls: list[AttentionCall] = []
    block = stream.decoder.blocks[index]
    with (
        at_hand(stream.decoder, index),
        _watching(stream, index, lambda *one: seen.append(one), method.id),
        Tap([attention_of(block)], calls.append),
    ):
        for first, x in stream.batches():
            stream.run(index, x, first)
            if not calls:
                raise UserError(f"{method.id}: the attention of {type(block).__name__} cannot be watched")
            attention = calls.pop().view().rows(slice(-1, None)).mean((1, 2))
            visual = _visual(stream, x.device)
            for matrix, given, made in seen:
                chosen = method.select(made, attention, visual)
                found.setdefault(matrix.name, Inputs(method.stats)).add(given[chosen])
            seen.clear()
    if stream.join is not None:
        stream.join(found.values())
    return found


def _visual(stream: Stream, device: torch.device) -> Tensor | None:
    """Which tokens of the batch inside the block show images, bool [b, L]; None where all are of a kind."""
    found = stream.feed.visual(stream.now)
    return None if found is None else found.to(device)


@contextmanager
def _watching(stream: Stream, index: int, see: See, asked: str) -> Iterator[None]:
    """Whenever block `index` runs in the stream, `see` is called for each of its matrices; errors begin with `asked`.

    Raises:
        UserError: experts are stacked.
    """
    with ExitStack() as stack:
        for matrix in stream.decoder.matrices(index):
            if matrix.module is None:
                raise UserError(
                    f"{asked}: the outputs of {matrix.name} are not seen, since its experts are stacked; choose "
                    "another one for such models"
                )
            hook = partial(_note, stream, matrix, see)
            stack.callback(matrix.module.register_forward_hook(hook).remove)
        yield


def _note(
    stream: Stream, matrix: Matrix, see: See, module: nn.Module, given: tuple[Tensor, ...], made: Tensor
) -> None:
    """A hook: a matrix's rows of what its layer made, by sequence."""
    x, y = given[0], made if matrix.rows is None else made[..., matrix.rows]
    if x.dim() == 2:  # OPT flattens its tokens before the MLP
        x, y = (part.unflatten(0, (stream.now.stop - stream.now.start, -1)) for part in (x, y))
    see(matrix, x, y)
