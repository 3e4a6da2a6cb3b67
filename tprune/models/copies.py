"""Copies of some of a decoder's layers, with weights of their own, that read a prompt before the decoder does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from tprune.core.reduction import gather_tokens
from tprune.errors import UserError
from tprune.methods.attention import Attention
from tprune.models.ahead import attention_ahead, attention_of
from tprune.models.layer_inputs import CACHES, LayerInputs
from tprune.models.run import Inputs, Run
from tprune.models.taps import AttentionCall, Tap
from tprune.models.track import Kept


class Copies:
    """What copies of a decoder's layers make of a prompt, the first of them taking what enters the decoder.

    They are built by the layers' own classes; the decoder's layers and their hooks are not touched.

    Args:
        core, layers: the decoder and its layers.
        run: the prompt's forward.
        given: what the first layer is given, by name, for all N tokens that entered.
    """

    def __init__(self, core: nn.Module, layers: Sequence[nn.Module], run: Run, given: Inputs):
        self.core, self.layers = core, layers
        self.run, self.given = run, given

    def weights(self, places: Sequence[int]) -> dict[str, Tensor]:
        """The decoder's own weights of the layers at `places`, by the number of the copy and their name there."""
        return {
            f"{copy}.{name}": tensor
            for copy, place in enumerate(places)
            for name, tensor in self.layers[place].state_dict().items()
        }

    def read(
        self,
        places: Sequence[int],
        weights: Mapping[str, Tensor],
        part: tuple[Tensor, Tensor | None] | None = None,
        positions: str = "original",
    ) -> list[Attention]:
        """The attention of every copy but the first, each copy reading what the one before it made.

        The last goes no further than its attention. Masks are those of the decoder's first layer.

        Args:
            places: of the layers that are copied, ascending, at least two.
            weights: of the copies, as `weights` names them; none: the decoder's own.
            part: the places that are read, int64 [B, K] ascending, and which are real, bool [B, K] or None; None: all.
            positions: of what is read: "original", or "compact" as if the rest were not there.

        Raises:
            UserError: the layers cannot be built anew, or the weights are of others.
        """
        copies = [self._built(copy, place, weights) for copy, place in enumerate(places)]
        given = self._given(part, positions)
        hidden = given["hidden_states"].to(next(copies[0].parameters()).dtype)
        seen: list[AttentionCall] = []
        with Tap([attention_of(copy) for copy in copies[1:-1]], seen.append):
            for copy, place in zip(copies[:-1], places, strict=False):
                output = copy.forward(**self._turned(given, place, hidden))
                hidden = output[0] if isinstance(output, tuple) else output
        last = attention_ahead(copies[-1], self._turned(given, places[-1], hidden))
        return [*(call.view() for call in seen), last]

    def _built(self, copy: int, place: int, weights: Mapping[str, Tensor]) -> nn.Module:
        """A layer as the decoder has it at `place`, with weights of its own."""
        kind, front = type(self.layers[place]), f"{copy}."
        own = {name.removeprefix(front): tensor for name, tensor in weights.items() if name.startswith(front)}
        try:
            with torch.device("meta"):
                made = kind(self.core.config, place).eval()
            # Parameters that are put in place take over whether the old ones learn.
            made.requires_grad_(any(tensor.requires_grad for tensor in own.values()))
            made.load_state_dict(own or self.layers[place].state_dict(), assign=True)
        except (TypeError, RuntimeError):
            raise UserError(
                f"layer {place} of this decoder, {kind.__name__}, cannot be copied with these weights; take the dense "
                "model that the method was fitted in"
            ) from None
        return made

    def _given(self, part: tuple[Tensor, Tensor | None] | None, positions: str) -> Inputs:
        """What the first layer would be given of a part of the prompt, without a cache."""
        given = self.given | {name: None for name in CACHES if name in self.given}
        if part is None:
            return given
        index, valid = part
        hidden = given["hidden_states"]
        given["hidden_states"] = gather_tokens(hidden, index)
        kept = Kept.of(index, valid, hidden.shape[1])
        # What is shared among the decoder's layers is of other tokens.
        LayerInputs(self.core, positions).fit(replace(self.run, fitted={}), 0, kept, given)
        return given

    def _turned(self, given: Inputs, place: int, hidden: Tensor) -> dict[str, Any]:
        """`given` with other hidden states, and the rotary embeddings of layer `place` where layers differ in them."""
        given = given | {"hidden_states": hidden}
        rotary = getattr(self.core, "rotary_emb", None)
        if rotary is not None and "layer_type" in signature(rotary.forward).parameters:
            turned = LayerInputs(self.core, "original").rotate(place, hidden, given["position_ids"])
            given["position_embeddings"] = turned
        return given
