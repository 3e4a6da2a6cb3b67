"""What prefill methods share that let tokens leave at a few layers of the decoder, down to fractions of the prompt."""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core.budget import exponent, staircase
from tprune.errors import UserError
from tprune.methods.base import param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class Steps(TokenMethod):
    """A staircase of fractions; --keep raises them all to one power."""

    native = ("layers", "rates")
    layers: tuple[int, ...] = param((), "layers before which tokens leave, of 32", low=1)
    rates: tuple[float, ...] = param((), "fraction of the prompt left after each", low=0, high=1)

    def stages(self, shape, knob):
        """The staircase of rates; the last token always goes on."""
        if len(self.layers) != len(self.rates):
            raise UserError(
                f"{self.id}: {len(self.layers)} layers and {len(self.rates)} rates; give as many of each"
            )
        power = 1.0 if knob is None else exponent(knob)
        counts = [round(shape.tokens * rate**power) for rate in self.rates]
        return staircase(self.layers, counts, 32, shape.depth)
