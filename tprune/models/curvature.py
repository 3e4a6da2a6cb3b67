"""Second moments at the inputs and outputs of all linear layers of a decoder, by one backward pass per sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack

from torch import Tensor, nn

from tprune.core.statistics import Gram, Inputs
from tprune.errors import UserError
from tprune.models.blocks import Decoder, is_experts
from tprune.models.gradients import asking_for, from_embeddings, losses
from tprune.models.inputs import Watch


def moments(
    decoder: Decoder, sequences: Iterable[Tensor], blocks: Sequence[int]
) -> list[tuple[dict[str, Inputs], dict[str, Tensor]]]:
    """Per block of `blocks`, the statistics "gram" of its layers' inputs, and those of the gradients at their outputs.

    The loss is the mean over a sequence's predicted tokens. Gradients flow to the embeddings alone: none of a
    parameter is computed, and what asks for gradients is as before afterwards.

    Args:
        decoder: as it stands.
        sequences: int64 [L] each.
        blocks: indices.

    Returns:
        `Inputs` by a matrix's `input`, and float32 [out, out], (2 / sequences) · Σ g gᵀ, by the same name.

    Raises:
        UserError: experts are stacked, so that their outputs are not seen.
    """
    watches = [Watch(decoder, index, ("gram",), None) for index in blocks]
    seen: list[dict[str, Gram]] = [{} for _ in watches]
    with ExitStack() as stack:
        for watch, sums in zip(watches, seen, strict=True):
            stack.enter_context(watch)
            for name, module in watch.modules.items():
                if is_experts(module):
                    raise UserError(
                        f"{name}: the outputs of stacked experts are not seen, and their curvature is needed; "
                        "choose another method for this model"
                    )
                sums[name] = Gram()
                stack.enter_context(module.register_forward_hook(_gradients_to(sums[name])))
        stack.enter_context(asking_for(decoder.model, ()))
        stack.enter_context(from_embeddings(decoder.model))
        for loss in losses(decoder.model, _watched(sequences, watches)):
            loss.backward()
    return [
        (watch.inputs, {name: total.result()["gram"] for name, total in sums.items()})
        for watch, sums in zip(watches, seen, strict=True)
    ]


def _watched(sequences: Iterable[Tensor], watches: Sequence[Watch]) -> Iterator[Tensor]:
    """The sequences, each once everybody who watches is ready for it."""
    for sequence in sequences:
        for watch in watches:
            watch.begin(1)
        yield sequence


def _gradients_to(total: Gram) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A hook that adds the gradients at a layer's outputs, when they come."""

    def look(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            total.add(gradient.detach().float())

        output.register_hook(add)

    return look
