"""Image tokens leave the caches of a vision-language model's decoder, per layer and key-value head.

The prompt goes through the decoder in full. Each layer's attention says what its entries are worth; when the last layer
has run, the method says how many image tokens each layer keeps, and every head keeps its own. Text stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from tprune.core import select
from tprune.core.budget import Site, Stage
from tprune.core.cache import Evict
from tprune.methods.cache import CacheMethod
from tprune.methods.tokens import TokenMethod
from tprune.models.cache_layer import PrunedLayer
from tprune.models.compress import Compression
from tprune.models.episode import Episode
from tprune.models.generating import Generating
from tprune.models.run import Inputs, Tally, real_tokens
from tprune.models.taps import AttentionCall


class ImageCaches(Compression):
    """A method that `evicts` at work, until `remove`. It shows what `DecoderDriver` shows.

    Args:
        model: a vision-language model of transformers.
        outer: the module whose call carries the whole prompt.
        method: what chooses.
        image_of: from the inputs of a prompt, by name, to bool [B, N], its image tokens; None where it has none.
        stages_of: as for `DecoderDriver`.
        exact: whether the stages say how many entries the layers keep on average, or the method as it stands.
        positions: "original" leaves gaps where entries left, "compact" closes them.
        check_later: called with the inputs of every later call on a cache; raises UserError for what cannot be right.
    """

    entrance, hides = None, False

    def __init__(
        self,
        model: nn.Module,
        outer: nn.Module,
        method: TokenMethod,
        image_of: Callable[[Inputs], Tensor | None],
        stages_of: Callable[[int], Sequence[Stage]],
        *,
        exact: bool,
        positions: str,
        check_later: Callable[[Inputs], None],
    ):
        # What comes behind the prompt all stays: no more is asked of a method of caches.
        super().__init__(model, CacheMethod(), 1.0, 0, positions == "compact", method.id)
        self.model, self.chooses = model, method
        self.prunable_of, self.stages_of, self.exact = image_of, stages_of, exact
        self.positions, self.check_later = positions, check_later
        self.tally = Tally(len(self.kinds))
        self.generating = Generating(model, method, len(self.kinds))
        self.episode = Episode(method, len(self.kinds))
        self.trace: list[tuple[Site, Tensor]] | None = None
        self.names = list(signature(outer.forward).parameters)
        self.inputs: Inputs = {}
        self.image: Tensor | None = None
        self.looked: list[tuple[PrunedLayer, Tensor, Tensor]] = []
        self.hooks.append(outer.register_forward_pre_hook(self._begin, with_kwargs=True))

    def remove(self) -> None:
        """Take all hooks out again."""
        super().remove()
        self.generating.remove()

    def _begin(self, module: nn.Module, args: tuple, kwargs: Inputs) -> None:
        """The model is called: a prompt to prune, or what comes behind one."""
        self.inputs = dict(zip(self.names, args, strict=False)) | kwargs
        self.image, self.looked = None, []
        cache = self.inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            self.check_later(self.inputs)
            return
        image = self.prunable_of(self.inputs)
        if image is not None and bool(image.any()):
            self.image, self.real = image, self.generating.prompt(real_tokens(self.inputs, image))

    def given_mask(self, kwargs: Inputs) -> Any:
        """The padding mask, of what the model was called with: some models make more of it for their decoders."""
        mask = self.inputs.get("attention_mask")
        return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def prune_prompt(self, place: int, layer: PrunedLayer, call: AttentionCall) -> None:
        """See what the entries of a layer are worth."""
        layer.started = True
        if self.image is not None:
            column = torch.arange(self.real.shape[1], device=self.real.device)
            last = column.mul(self.real).argmax(1, keepdim=True)
            self.looked.append((layer, *self.chooses.worth(call.view(), self.image, last)))

    def _after(self, base: nn.Module, args: tuple, output: Any) -> None:
        super()._after(base, args, output)
        if self.looked:
            self.leave()

    def leave(self) -> None:
        """The prompt has gone through all layers: entries leave."""
        images = self.image.sum(1)
        wanted = None
        if self.exact:
            stages = [self.stages_of(number) for number in images.tolist()]
            wanted = torch.tensor([row[-1].count if row else 0 for row in stages], device=images.device)
        counts = self.chooses.counts(torch.stack([fact for _, _, fact in self.looked]), images, wanted)
        entering = images.sum().expand(len(self.kinds)).clone()
        entering[self.places] = counts.sum(1)
        self.tally.count(entering, self.image)
        for place, (layer, worth, _), count in zip(self.places, self.looked, counts, strict=True):
            index = self._hold(layer, worth, count.cpu())
            if self.trace is not None:
                self.trace.append((Site(place), self._left(index)))
            if self.turns[self.kinds[place]] is not None:
                layer.shift_to_compact(self.turns[self.kinds[place]])
        self.looked = []

    def _hold(self, layer: PrunedLayer, worth: Tensor, count: Tensor) -> Tensor:
        """Let a layer keep its text and each head's `count` [B] best image entries: their slots [B, G, K]."""
        batch, groups = worth.shape[:2]
        index, valid = select.keep_prunable_top(
            worth.flatten(0, 1),
            count.repeat_interleave(groups),
            self.image.repeat_interleave(groups, dim=0),
        )
        index = index.view(batch, groups, -1)
        # What is no image token stays in every head, so that fillers and padding stand in the same places.
        real = self.real.gather(1, index[:, 0])
        real = real if valid is None else real & valid.view(index.shape)[:, 0]
        numbered = (self.real.cumsum(1) - 1).clamp_min(0).unsqueeze(1).expand(-1, groups, -1)
        edit = Evict(index)
        layer.hold(
            edit.apply(layer.keys),
            edit.apply(layer.values),
            edit.apply(numbered),
            {},
            None if bool(real.all()) else real,
        )
        return index

    def _left(self, index: Tensor) -> Tensor:
        """For a trace: every token's place, or -1 where no head [B, G, K] keeps it."""
        column = torch.arange(self.image.shape[1], device=index.device).expand_as(self.image)
        return torch.where(select.mark(index.flatten(1), None, self.image.shape[1]), column, -1)
