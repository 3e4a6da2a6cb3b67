"""How the layers of a decoder make keys and values of their inputs, and the inputs themselves, for methods that ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tprune.errors import UserError
from tprune.methods.cache_view import LayerView, Projections
from tprune.models.blocks import Decoder, find_decoder
from tprune.models.matrix import Matrix
from tprune.models.rope import Rotation

TOLERANCE = 0.05
"""By how much of their size keys and values that we made may differ from the model's: half precision rounds."""

Rotate = Callable[[Tensor, Tensor], Tensor]
"""Keys [B, G, t, d] and positions [B, t] to rotated keys."""


def given_positions(position: Tensor | None, tokens: Tensor, seen: int) -> Tensor:
    """Position ids [B, q] of `tokens` [B, q, ...] after `seen` others: as given, else those of the model's own."""
    rows, count = tokens.shape[:2]
    if position is None:
        position = torch.arange(seen, seen + count, device=tokens.device).unsqueeze(0)
    return position.expand(rows, count)


class Entering:
    """What an attention module was given last, `inputs` [B, q, D], until `remove`."""

    def __init__(self, module: nn.Module):
        self.inputs: Tensor | None = None
        self.hook = module.register_forward_pre_hook(self._keep, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook off."""
        self.hook.remove()

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.inputs = args[0] if args else kwargs["hidden_states"]


class KeyValues:
    """Watches what attention modules are given, each while it runs, until `remove`.

    Attributes:
        position: int64 [B, q], the position ids of these tokens.
    """

    def __init__(
        self, model: nn.Module, modules: dict[int, nn.Module], kinds: Sequence[str | None], who: str
    ):
        self.who, self.position = who, torch.empty(0)
        self.projections = projections(model, modules, kinds, who)
        self.entering = {place: Entering(module) for place, module in modules.items()}
        self.hooks = [
            module.register_forward_hook(partial(self._forget, place)) for place, module in modules.items()
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in [*self.entering.values(), *self.hooks]:
            hook.remove()

    def inputs(self, place: int) -> Tensor:
        """What the attention of a layer that is running was given, [B, q, D]."""
        return self.entering[place].inputs

    def _forget(self, place: int, *args: Any) -> None:
        """A prompt's inputs to all layers take more memory than its cache."""
        self.entering[place].inputs = None

    def begin(self, position: Tensor | None, tokens: Tensor, seen: int) -> None:
        """A call of the decoder with `tokens` [B, q, ...] after `seen` others, and the position ids it was given."""
        self.position = given_positions(position, tokens, seen)

    def show(self, place: int, views: Sequence[LayerView], valid: Tensor | None) -> None:
        """Give the views of a prompt, all rows in one or one a row, what their entries were made of.

        Raises:
            UserError: some entries are of a call that was not watched, or are not made as we think.
        """
        inputs, made = self.inputs(place), self.projections[place]
        entries = views[0].length if valid is None else valid.shape[1]
        if inputs.shape[1] != entries:
            raise UserError(f"{self.who} reads what a whole prompt was made of: start from an empty cache")
        for row, view in enumerate(views):
            one = slice(None) if valid is None else slice(row, row + 1)
            real = slice(None) if valid is None else valid[row]
            view.inputs, view.begin = inputs[one, real], self.position[one, real][:, 0]
            view.projections = made
        made.once("checked", lambda: self._check(made, views[0]))

    def _check(self, made: Projections, view: LayerView) -> None:
        """The last entries must come out as the model has them."""
        last = view.begin.unsqueeze(1) + view.length - 1
        keys, values = made.project(view.inputs[:, -1:])
        found = made.finish_keys(keys, last), made.finish_values(values)
        for ours, theirs in zip(found, (view.key, view.value), strict=True):
            theirs = theirs[:, :, -1:]
            if (ours - theirs).norm() > TOLERANCE * theirs.norm():
                raise UserError(
                    f"{self.who} cannot make the keys and values of this model from their projections: its attention "
                    "does more than norms of heads and RoPE; take another method"
                )


def projections(
    model: nn.Module, modules: dict[int, nn.Module], kinds: Sequence[str | None], who: str
) -> dict[int, Projections]:
    """How the layers of these attention modules make keys and values.

    Raises:
        UserError: projections that cannot be told apart, or RoPE that changes with the length.
    """
    decoder = find_decoder(model)
    turns = any(hasattr(module, "rope_type") for module in decoder.core.modules())
    rotation = Rotation(decoder.core, who, "take another method") if turns else None

    def rotate(place: int) -> Rotate | None:
        return None if rotation is None else partial(rotation.rotate, layer_type=kinds[place])

    return {
        place: _projections(decoder, place, module, rotate(place), who) for place, module in modules.items()
    }


def _projections(
    decoder: Decoder, place: int, module: nn.Module, rotate: Rotate | None, who: str
) -> Projections:
    matrices = {matrix.name.rpartition(".")[2]: matrix for matrix in decoder.matrices(place)}
    key, value = (matrices.get(f"{part}_proj", matrices.get(part)) for part in "kv")
    if key is None or value is None:
        raise UserError(f"{who} finds no projections of keys and values in {type(module).__name__}")
    config = decoder.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    biases = [_bias(decoder, matrix) for matrix in (key, value)]
    norm = getattr(module, "k_norm", None)

    def weights() -> tuple[Tensor, Tensor]:
        return key.cut(key.parameter.data), value.cut(value.parameter.data)

    def heads(x: Tensor, bias: Tensor | None) -> Tensor:
        return (x if bias is None else x + bias).unflatten(2, (-1, width))

    def finish_keys(keys: Tensor, position: Tensor) -> Tensor:
        keys = heads(keys, biases[0])
        keys = (keys if norm is None else norm(keys)).transpose(1, 2)
        return keys if rotate is None else rotate(keys, position)

    def finish_values(values: Tensor) -> Tensor:
        return heads(values, biases[1]).transpose(1, 2)

    return Projections(weights, finish_keys, finish_values)


def _bias(decoder: Decoder, matrix: Matrix) -> Tensor | None:
    """Of the rows of a matrix."""
    bias = decoder.model.get_submodule(matrix.input).bias
    if bias is None or matrix.rows is None:
        return bias
    return bias[matrix.rows.to(bias.device)]
