"""Pruning the weights of an encoder with a decoder beside it (T5, BART): which methods can, on which text."""

from __future__ import annotations

from torch import nn

from tprune.errors import UserError
from tprune.methods.region import RegionMethod
from tprune.methods.weights import WeightMethod
from tprune.models.blocks import Decoder
from tprune.models.encoder_decoder import EncoderDecoder
from tprune.pipelines.masks_only import check_masks_only
from tprune.progress import Progress
from tprune.recipe import Stage


def check(stage: Stage, method: WeightMethod, model: nn.Module) -> None:
    """Refuse what asks for more than a matrix and its inputs.

    Raises:
        UserError: naming the method or the option.
    """
    said = f"{type(model).__name__} has an encoder beside its decoder"
    check_masks_only(stage, method, said)
    if isinstance(method, RegionMethod):
        raise UserError(
            f"{said}, and {stage.method} trains blocks that stand alone; choose a method that needs a matrix and its "
            "inputs, such as wanda, sparsegpt or magnitude"
        )


def protocol(decoder: Decoder, length: int, progress: Progress) -> dict[str, int]:
    """How many tokens of a sequence of `length` the encoder reads, and how many are foretold; nothing of one stack."""
    if not isinstance(decoder, EncoderDecoder):
        return {}
    read, foretold = length // 2, length - length // 2
    progress.say(
        f"the encoder reads the first {read} tokens of a sequence, the decoder foretells the other {foretold}"
    )
    return {"read": read, "foretold": foretold}
