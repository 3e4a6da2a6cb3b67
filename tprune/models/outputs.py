"""What is looked at in the outputs of a block's matrices while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import fsum

from torch import Tensor, nn

from tprune.core.statistics import mean_likeness
from tprune.errors import UserError
from tprune.models.blocks import Decoder, Matrix


@contextmanager
def watching_outputs(decoder: Decoder, index: int, length: int) -> Iterator[dict[str, float]]:
    """How alike the outputs of each matrix of a block are within a sequence, by its name, once the `with` ends.

    Args:
        decoder: runs block `index`, on whole sequences of `length` tokens.
        index: of the block.
        length: of every sequence.

    Raises:
        UserError: experts are stacked, so that their outputs are not seen.
    """
    matrices = decoder.matrices(index)
    sums: dict[str, list[Tensor]] = {matrix.name: [] for matrix in matrices}
    found: dict[str, float] = {}
    with ExitStack() as stack:
        for matrix in matrices:
            if matrix.module is None:
                raise UserError(
                    f"--allocate tamp-das: the outputs of {matrix.name} are not seen; choose another rule for experts"
                )
            hook = _note(matrix, length, sums[matrix.name])
            stack.callback(matrix.module.register_forward_hook(hook).remove)
        yield found
    for name, parts in sums.items():
        every = [value for part in parts for value in part.tolist()]
        found[name] = fsum(every) / len(every)  # batches come in any order


def _note(
    matrix: Matrix, length: int, parts: list[Tensor]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A hook that notes the likeness of every sequence's outputs."""

    def look(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        own = output if matrix.rows is None else output[..., matrix.rows]
        # OPT flattens its tokens before the MLP.
        parts.append(mean_likeness(own.reshape(-1, length, own.shape[-1])))

    return look
