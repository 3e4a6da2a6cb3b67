"""What enters a model for calibration: sequences of tokens, images, or prompts with images in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tprune.models.blocks import Decoder

NOT_LEARNED = -100
"""The label of a token that the loss leaves out."""


class Feed:
    """Samples in front of a model's first block.

    Iterating gives for each what computes its loss of a model, as `tprune.models.gradients.losses` takes it.

    Attributes:
        alike: whether all have one length and the blocks are called with them in one way, so that several go together;
            samples that are not alike go one by one, and none is padded.
        lengths: tokens of each sample.
    """

    alike = True
    lengths: Sequence[int]

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Any]:
        return (partial(self.loss, place) for place in range(len(self)))

    @property
    def shape(self) -> tuple[int, int]:
        """How many samples, and tokens of the longest."""
        return len(self), max(self.lengths)

    def __getitem__(self, part: slice) -> Feed:
        """Some of the samples."""
        raise NotImplementedError

    def call(self, decoder: Decoder, part: slice) -> None:
        """Run the model on some samples, as far as whoever stands in for its blocks lets it."""
        raise NotImplementedError

    def loss(self, place: int, model: nn.Module) -> Tensor:
        """The loss of one sample, with its graph."""
        raise NotImplementedError

    def summary(self) -> Tensor:
        """The token of every sample that stands for all of it, int64 [N]: the last."""
        return torch.tensor(self.lengths) - 1

    def visual(self, part: slice) -> Tensor | None:
        """Which tokens of some samples show images and which are text, bool [B, L]; None where all are of a kind."""
        return None


class Tokens(Feed):
    """Sequences of tokens `ids`, int64 [N, L]."""

    def __init__(self, ids: Tensor):
        self.ids, self.lengths = ids, [ids.shape[1]] * len(ids)

    def __getitem__(self, part: slice) -> Tokens:
        return Tokens(self.ids[part])

    def call(self, decoder: Decoder, part: slice) -> None:
        """Through the decoder without its head."""
        decoder.send(self.ids[part])

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.ids)


class Pictures(Feed):
    """Images for a vision transformer.

    Attributes:
        pixels: [N, 3, H, W], as the model's preprocessing makes them.
        tokens: what the model makes of each, prefix tokens among them.
        classes: int64 [N], or None where they are not known.
    """

    def __init__(self, pixels: Tensor, tokens: int, classes: Tensor | None):
        self.pixels, self.tokens, self.classes = pixels, tokens, classes
        self.lengths = [tokens] * len(pixels)

    def __getitem__(self, part: slice) -> Pictures:
        return Pictures(self.pixels[part], self.tokens, None if self.classes is None else self.classes[part])

    def call(self, decoder: Decoder, part: slice) -> None:
        """Through the whole model."""
        decoder.core(self._given(decoder.core, part))

    def summary(self) -> Tensor:
        """The class token, or of a model without one the first patch."""
        return torch.zeros(len(self), dtype=torch.int64)

    def _given(self, model: nn.Module, part: slice) -> Tensor:
        parameter = next(model.parameters())
        return self.pixels[part].to(parameter.device, parameter.dtype)

    def loss(self, place: int, model: nn.Module) -> Tensor:
        """Cross entropy of its class."""
        found = model(self._given(model, slice(place, place + 1)))
        logits = found if isinstance(found, Tensor) else found.logits
        label = self.classes[place : place + 1].to(logits.device)
        return functional.cross_entropy(logits.float(), label)


class Prompts(Feed):
    """Prompts with images, each as its model's processor makes it.

    Attributes:
        inputs: of every prompt the model's arguments by name, all with a first dimension of one prompt or its images.
        image: the token that stands for a piece of an image.
    """

    alike = False

    def __init__(self, inputs: Sequence[dict[str, Tensor]], image: int):
        self.inputs, self.image = inputs, image
        self.lengths = [one["input_ids"].shape[1] for one in inputs]

    def __getitem__(self, part: slice) -> Prompts:
        return Prompts(self.inputs[part], self.image)

    def call(self, decoder: Decoder, part: slice) -> None:
        """Through the model without its head: its own towers, its own merging, its own positions."""
        (inputs,) = self.inputs[part]
        getattr(decoder.model, "model", decoder.model)(**placed(inputs, decoder.model), use_cache=False)

    def loss(self, place: int, model: nn.Module) -> Tensor:
        """The mean over the text's tokens, as a language model foretells them."""
        inputs = placed(self.inputs[place], model)
        ids = inputs["input_ids"]
        labels = ids.masked_fill(ids == self.image, NOT_LEARNED)
        return model(**inputs, labels=labels, use_cache=False).loss

    def visual(self, part: slice) -> Tensor:
        """Where the image's tokens are, of one prompt."""
        (inputs,) = self.inputs[part]
        return inputs["input_ids"] == self.image


def placed(inputs: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The arguments where the model is, in its precision."""
    parameter = next(model.parameters())
    return {
        name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
