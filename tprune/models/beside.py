"""Tokens of a method's own behind a prompt: they see it and each other, and nothing of it sees them.

So the prompt runs as it always does. What its layers cached is kept, and the model's own layers make of those tokens
what they would have made had they stood at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from tprune.errors import UserError
from tprune.methods.attention import Attention
from tprune.methods.tokens import TokenMethod
from tprune.models.layer_inputs import CACHES, LayerInputs, window_of
from tprune.models.run import Inputs, Run
from tprune.models.taps import AttentionCall, Tap
from tprune.models.track import gather_last


@dataclass(eq=False)
class Heard:
    """What was seen of one prompt.

    Attributes:
        ids: the decoder's position ids [..., B or 1, N].
        given: what its first layer was given, by name.
        cached: of every layer that ran so far, keys and values [B, G, N, d].
    """

    ids: Tensor
    given: Inputs = field(default_factory=dict)
    cached: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Joined:
    """A layer's cache as tokens behind the prompt see it: its keys and values [B, G, N, d], theirs behind them."""

    def __init__(self, key: Tensor, value: Tensor):
        self.key, self.value = key, value

    def update(self, key: Tensor, value: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Both in order; nothing is kept."""
        return torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)


def check(method: TokenMethod, core: nn.Module) -> None:
    """Raise UserError where `method` puts tokens of its own behind a prompt, and the decoder does not allow it."""
    if "beside" in method.reads and not hasattr(core, "rotary_emb"):
        raise UserError(
            f"{method.id} needs a decoder with rotary embeddings, and {type(core).__name__} has none"
        )


class Beside:
    """Sees prompts go through a decoder, until `remove`.

    Args:
        core, layers, attentions: the decoder, its layers and their attention modules.
        inputs: fits what layers are given.
        head: from the last layer's [..., D] to logits [..., V].
        current: the run that goes on, if any; what is heard of it is its `heard`.
    """

    def __init__(
        self,
        core: nn.Module,
        layers: Sequence[nn.Module],
        attentions: Sequence[nn.Module],
        inputs: LayerInputs,
        head: Callable[[Tensor], Tensor],
        current: Callable[[], Run | None],
    ):
        self.layers, self.attentions, self.inputs = layers, attentions, inputs
        self.windows = [window_of(core, place) for place in range(len(layers))]
        self.head, self.current = head, current
        self.names = {module: list(signature(module.forward).parameters) for module in (core, layers[0])}
        self.cache_name = next(name for name in CACHES if name in self.names[layers[0]])
        self.running = False
        self.tap = Tap(self.attentions, self._observe)
        self.handles = [
            core.register_forward_pre_hook(self._enter, with_kwargs=True),
            layers[0].register_forward_pre_hook(self._first, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Take all hooks off."""
        self.tap.remove()
        for handle in self.handles:
            handle.remove()

    def _prompt(self) -> Run | None:
        run = self.current()
        return run if run is not None and run.is_prompt and not self.running else None

    def _enter(self, module: nn.Module, args: tuple, kwargs: Inputs) -> None:
        if (run := self._prompt()) is not None:
            given = dict(zip(self.names[module], args, strict=False)) | kwargs
            ids = given.get("position_ids")
            if ids is None:
                ids = torch.arange(run.length, device=run.prunable.device)[None]
            # Models whose positions have rows and columns may put plain ones for their masks in front.
            run.heard = Heard(ids[1:] if ids.dim() == 3 and len(ids) == 4 else ids)

    def _first(self, module: nn.Module, args: tuple, kwargs: Inputs) -> None:
        if (run := self._prompt()) is not None:
            run.heard.given = dict(zip(self.names[module], args, strict=False)) | kwargs

    def _observe(self, call: AttentionCall) -> None:
        if (run := self._prompt()) is not None:
            run.heard.cached.append((call.key, call.value))

    def of(self, heard: Heard, real: Tensor) -> Behind:
        """Tokens behind a prompt whose own tokens are `real`, bool [B, N]."""
        return Behind(self, heard, real)


class Behind:
    """What a token behind a prompt becomes.

    Args:
        beside: of the decoder.
        heard: of the prompt.
        real: bool [B, N], which of its tokens are no padding, and no answer.
    """

    def __init__(self, beside: Beside, heard: Heard, real: Tensor):
        self.beside, self.heard, self.real = beside, heard, real
        place = torch.arange(real.shape[1], device=real.device)
        self.last = (place * real).argmax(1, keepdim=True)
        self.ids = gather_last(heard.ids, self.last) + 1

    def look(self, added: Tensor) -> Attention:
        """The attention of one token, after `added` [K, D] has been added to it before each of the first K layers.

        Of layer K - 1: the query [B, H, 1, d], the keys [B, G, N + 1, d] of the prompt and itself.
        """
        none = self.heard.given["hidden_states"][:, :0]
        _, call = self._run(added, none, self.ids, self.real[:, :0], len(added) - 1)
        return call.view()

    def tell(self, added: Tensor, layer: int, answers: Tensor) -> tuple[Attention, Tensor]:
        """What stands behind the prompt with the token before it, and what is said there, while a method is fitted.

        Args:
            added: [L, D], one for every layer.
            layer: whose attention is wanted.
            answers: bool [B, N], the tokens that stand behind the prompt in the same sequence.

        Returns:
            the token's attention as `look` gives it (its keys end with the answers', which it does not see), and the
            logits of every answer's tokens [n, V], row by row, the first of each told by the token.
        """
        first = int(answers.any(0).int().argmax())
        hidden = self.heard.given["hidden_states"][:, first:]
        place = torch.arange(first, answers.shape[1], device=answers.device).expand(len(hidden), -1)
        ids = torch.cat([self.ids, gather_last(self.heard.ids, place) + 1], dim=-1)
        hidden, call = self._run(added, hidden, ids, answers[:, first:], layer)
        attention = call.view()
        attention.query, attention.bias = attention.query[:, :, :1], attention.bias[:, :, :1]
        said = self.beside.head(hidden[:, :-1])
        return attention, said[answers[:, first:]].float()

    def _run(
        self, added: Tensor, hidden: Tensor, ids: Tensor, real: Tensor, watched: int
    ) -> tuple[Tensor, AttentionCall]:
        """A token of its own, and `hidden` [B, T - 1, D] behind it (`real` of it), through as many layers as `added`.

        Returns:
            the residual stream [B, T, D], and the attention of layer `watched`.

        Raises:
            UserError: that layer does not see all of the prompt.
        """
        beside, given = self.beside, self.heard.given
        window = beside.windows[watched]
        if window is not None and window <= self.real.shape[1]:
            raise UserError(
                f"the token behind the prompt looks from layer {watched}, which sees {window} of its "
                f"{self.real.shape[1]} tokens; choose a layer with full attention (--set layer=…, of 32)"
            )
        hidden = torch.cat([hidden.new_zeros(len(hidden), 1, hidden.shape[2]), hidden], dim=1)
        masks = {window: self._mask(real, window) for window in {*beside.windows}}
        seen: list[AttentionCall] = []
        beside.running = True
        try:
            with Tap([beside.attentions[watched]], seen.append):
                for place, more in enumerate(added):
                    own, *others = hidden.split([1, hidden.shape[1] - 1], dim=1)
                    hidden = torch.cat([own + more.to(own.dtype), *others], dim=1)
                    made = {
                        "hidden_states": hidden,
                        "attention_mask": masks[beside.windows[place]],
                        "position_ids": ids,
                        "position_embeddings": beside.inputs.rotate(place, hidden, ids),
                        beside.cache_name: Joined(*self.heard.cached[place]),
                    }
                    # Past its hooks: what a method does to the prompt there is not done to these tokens.
                    output = beside.layers[place].forward(**(given | made))
                    hidden = output[0] if isinstance(output, tuple) else output
        finally:
            beside.running = False
        return hidden, seen[0]

    def _mask(self, real: Tensor, window: int | None) -> Tensor:
        """For [B, 1, T, N + T]: all see the prompt, and what of themselves came before, within the window if any."""
        count = real.shape[1] + 1
        own = torch.cat([real.new_ones(len(real), 1), real], dim=1)[:, None]
        causal = torch.ones(count, count, dtype=torch.bool, device=real.device).tril()
        prompt = self.real[:, None].expand(-1, count, -1)
        if window is not None:
            causal = causal.triu(1 - window)
            place = torch.arange(self.real.shape[1], device=real.device)
            behind = torch.arange(1, count + 1, device=real.device) + self.last  # [B, T]
            prompt = prompt & (place > behind.unsqueeze(2) - window)
        own = (own & causal) | torch.eye(count, dtype=torch.bool, device=real.device)
        return self.beside.inputs.as_mask(torch.cat([prompt, own], dim=2)[:, None])
