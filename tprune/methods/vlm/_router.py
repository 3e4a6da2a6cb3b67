"""What par learns: a small causal decoder that reads a prompt and then one token for every layer of the large one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tprune.core.rotary import rotated


class Router(nn.Module):
    """Layers as Llama has them, and a logit of staying for every token.

    Args:
        layers: how many.
        width, heads: of the large decoder.
        inner: width of the MLPs.
        depth: how many layers the large decoder has.
    """

    speed: Tensor

    def __init__(self, layers: int, width: int, heads: int, inner: int, depth: int):
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(depth, width))
        self.layers = nn.ModuleList(Layer(width, heads, inner) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.score = nn.Linear(width, 1, bias=False)
        self.register_buffer("speed", torch.empty(width // heads // 2))

    def begin(self, generator: torch.Generator) -> Router:
        """Itself, with initial values as the authors have them, drawn from `generator`."""
        for name, parameter in self.named_parameters():
            if name == "tokens":
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02, generator=generator)
            else:
                nn.init.ones_(parameter)
        pairs = len(self.speed)
        self.speed.copy_(10_000.0 ** -(torch.arange(pairs) / pairs))
        return self

    def forward(
        self, hidden: Tensor, real: Tensor, noise: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The logits of a prompt's tokens, float32 [B, N], and of the layers [B, L].

        Args:
            hidden: [B, N, D], what enters the large decoder.
            real: bool [B, N], False for padding.
            noise: where given, standard normal noise drawn from it is added to all attention logits.
        """
        batch, length = real.shape
        x = torch.cat([hidden.float(), self.tokens.expand(batch, -1, -1)], dim=1)
        real = functional.pad(real, (0, len(self.tokens)), value=True)
        place = (real.cumsum(1) - 1).clamp_min(0)
        total = real.shape[1]
        seen = torch.ones(total, total, dtype=torch.bool, device=real.device).tril() & real[:, None, None]
        # Padding in front sees nothing but itself.
        seen = seen | torch.eye(total, dtype=torch.bool, device=real.device)
        for layer in self.layers:
            x = layer(x, place, self.speed, seen, noise)
        logits = self.score(self.norm(x))[..., 0]
        return logits[:, :length], logits[:, length:]


class Layer(nn.Module):
    """Attention and a gated MLP, normalised before."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.query, self.key = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(
        self, x: Tensor, place: Tensor, speed: Tensor, seen: Tensor, noise: torch.Generator | None
    ) -> Tensor:
        """x [B, T, D], place int64 [B, T], speed [D / 2H] of rotation, seen bool [B, 1, T, T] -> [B, T, D]."""
        normal = self.norm_attention(x)
        query, key, value = (
            part(normal).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        query, key = rotated(query, place, speed), rotated(key, place, speed)
        if noise is not None:
            shape = (*query.shape[:3], query.shape[2])
            drawn = torch.randn(shape, generator=noise, device=x.device)
            seen = drawn.masked_fill(~seen, -torch.inf)
        read = functional.scaled_dot_product_attention(query, key, value, seen)
        x = x + self.out(read.transpose(1, 2).flatten(2))
        normal = self.norm_mlp(x)
        return x + self.down(functional.silu(self.gate(normal)) * self.up(normal))


def empty(*sizes: int) -> Router:
    """A router of these sizes without values."""
    with torch.device("meta"):
        return Router(*sizes)
