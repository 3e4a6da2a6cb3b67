"""How an encoder that is pruned sublayer by sublayer differs from the dense one, and what its units know of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional

from tprune.core.weights import StructureEdit
from tprune.methods.weight_view import Place, Sublayer
from tprune.models import units
from tprune.models.blocks import Decoder
from tprune.models.gradients import asking_for, from_embeddings
from tprune.models.halves import masked


class Teacher:
    """The dense encoder on some sequences: its answers, and what leaves every sublayer before the norm.

    Args:
        encoder: dense, with norms behind the residual stream (BERT's make); never touched.
        sequences: int64 [N, L].
        batch: sequences per pass.
    """

    def __init__(self, encoder: Decoder, sequences: Tensor, batch: int):
        self.encoder, self.parts = encoder, sequences.split(batch)
        self.tokens, self.samples = sequences.numel(), len(sequences)
        depth = range(len(encoder.blocks))
        self.sites = {
            (index, kind): units.site(encoder, index, kind) for index in depth for kind in units.WIRING
        }
        self.answers: list[Tensor] = []
        self.leaving: dict[Place, list[Tensor]] = {place: [] for place in self.sites}
        with torch.no_grad(), ExitStack() as stack:
            for place, site in self.sites.items():
                stack.enter_context(_before(_feed(site), self._enter(place)))
                stack.enter_context(site.reader.register_forward_hook(self._leave(place)))
            for ids in self.parts:
                self.answers.append(self._answer(ids))

    def sublayer(self, edits: Sequence[StructureEdit], place: Place, temperature: float) -> Sublayer:
        """The units at `place`, and what those there and behind it know, with the edits made before it.

        Knowledge of answers is half the squared gradient of the divergence from the dense model's (KL at a temperature,
        times its square; squared error without classes) with respect to a factor 1 on an input of the reader, summed
        over passes and divided by the sequences; knowledge of the representation is the mean square of that input.
        """
        places = list(self.sites)
        behind = places[places.index(place) :]
        answers, squares = dict.fromkeys(behind, 0.0), dict.fromkeys(behind, 0.0)
        features: list[Tensor] = []
        entering: list[Tensor] = []
        slopes: dict[Place, Tensor] = {}

        def watch(one: Place) -> Callable[[Tensor], None]:
            def look(z: Tensor) -> None:
                flat = z.detach().flatten(0, -2)
                squares[one] = squares[one] + flat.square().sum(0)
                if one == place:
                    features.append(flat)
                z.register_hook(
                    lambda gradient: slopes.update({one: (gradient.flatten(0, -2) * flat).sum(0)})
                )

            return look

        model = self.encoder.model
        with masked(self.encoder, edits), asking_for(model, ()), from_embeddings(model), ExitStack() as stack:
            for one in behind:
                stack.enter_context(_before(self.sites[one].reader, watch(one)))
            stack.enter_context(
                _before(_feed(self.sites[place]), lambda x: entering.append(x.detach().flatten(0, -2)))
            )
            for ids, dense in zip(self.parts, self.answers, strict=True):
                with torch.enable_grad():
                    self._divergence(self._answer(ids), dense, temperature).backward()
                for one in behind:
                    answers[one] = answers[one] + slopes[one].square() / 2
        bias = self.sites[place].reader.bias
        target = torch.cat(self.leaving[place]) - torch.cat(entering) - (0 if bias is None else bias)
        return Sublayer(
            torch.cat(features),
            target,
            {one: value / self.samples for one, value in answers.items()},
            {one: value / self.tokens for one, value in squares.items()},
        )

    def _answer(self, ids: Tensor) -> Tensor:
        """Logits [B, C]; of an encoder without classes the means of all tokens [B, D]."""
        out = self.encoder.model(input_ids=ids.to(self.encoder.model.device))
        return out.logits if hasattr(out, "logits") else out.last_hidden_state.mean(1)

    def _divergence(self, answer: Tensor, dense: Tensor, temperature: float) -> Tensor:
        if not hasattr(self.encoder.model, "classifier"):
            return functional.mse_loss(answer, dense)
        wanted = (dense / temperature).softmax(1)
        found = (answer / temperature).log_softmax(1)
        return functional.kl_div(found, wanted, reduction="batchmean") * temperature**2

    def _enter(self, place: Place) -> Callable[[Tensor], None]:
        return lambda x: self.leaving[place].append(x.flatten(0, -2).clone())

    def _leave(self, place: Place) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            self.leaving[place][-1] += output.flatten(0, -2)

        return add


def _feed(site: units.Site) -> nn.Module:
    """What first reads the residual stream in a sublayer."""
    return next(iter(site.feeds.values()))


def _before(module: nn.Module, look: Callable[[Tensor], None]) -> torch.utils.hooks.RemovableHandle:
    """`look` sees what goes into the module."""
    return module.register_forward_pre_hook(lambda module, arguments: look(arguments[0]))
