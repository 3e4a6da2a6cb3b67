"""The blocks of a model, whatever it reads."""

from __future__ import annotations

from torch import nn

from tprune.models.blocks import Decoder, find_decoder, has_encoder
from tprune.models.encoder_decoder import find_pair
from tprune.models.vision_blocks import find_vision, is_vision


def find_blocks(model: nn.Module) -> Decoder:
    """The blocks of a model: its decoder's, an encoder's and those of the decoder beside it, or a vision transformer's.

    Raises:
        UserError: as `find_decoder`, `find_pair` and `find_vision`.
    """
    if is_vision(model):
        return find_vision(model)
    return find_pair(model) if has_encoder(model) else find_decoder(model)
