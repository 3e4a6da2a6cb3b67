"""An encoder whose attention heads are experts: a router takes one of each group, for every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tprune.core.relax import straight_through
from tprune.core.routing import groups_of, top_of_groups
from tprune.models.units import Site

SPREAD = 0.02
"""Standard deviation of a router's weights at the start."""


class Router(nn.Module):
    """Which heads of one block count for a token.

    Args:
        place: the heads.
        width: of what enters the block.
        groups: so many heads are taken.
        generator: of the first weights.

    Attributes:
        weight: float32 [H, D].
        usage: float32 [H], for how many tokens each head was taken; a parameter, so that checkpoints have it.
        fresh: the same since `settle`.
    """

    def __init__(self, place: Site, width: int, groups: int, generator: torch.Generator):
        super().__init__()
        device = place.reader.weight.device
        drawn = torch.randn(place.count, width, generator=generator) * SPREAD
        self.weight = nn.Parameter(drawn.to(device))
        self.usage = nn.Parameter(torch.zeros(place.count, device=device))
        self.register_buffer("groups", groups_of(place.count, groups).to(device), persistent=False)
        self.register_buffer("fresh", torch.zeros(place.count, device=device), persistent=False)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """What the heads count for tokens [B, T, D], of which `real`, bool [B, T], are no padding: [B, T, H]."""
        taken, soft = top_of_groups(nn.functional.linear(x, self.weight), self.groups)
        # In float32: autocast makes bfloat16 of the rest, which counts no further than 256.
        self.fresh += (taken.detach() * real.unsqueeze(-1)).flatten(0, -2).sum(0, dtype=torch.float32)
        return straight_through(taken, soft)

    def stays(self) -> Tensor:
        """1 for the head of each group that was taken most often, [H]."""
        return top_of_groups(self.usage.detach(), self.groups)[0]


class Routing(nn.Module):
    """The routers of all blocks, and how far routing is.

    Attributes:
        blend: how much of a head that is not taken is missing, 0 to 1.
        fixed: whether the most used heads count for all tokens.
        real: bool [B, T], which tokens are no padding.
    """

    def __init__(self, routers: Sequence[Router]):
        super().__init__()
        self.routers = nn.ModuleList(routers)
        self.blend, self.fixed = 0.0, False
        self.real: Tensor | None = None

    @torch.no_grad()
    def settle(self, blend: float, fixed: bool) -> None:
        """After a step: note what was taken, where that took the others away, and how it goes on."""
        counts = [router.fresh for router in self.routers]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for fresh in counts:
                torch.distributed.all_reduce(fresh)
        for router, fresh in zip(self.routers, counts, strict=True):
            if self.blend == 1 and not self.fixed:
                router.usage += fresh
            fresh.zero_()
        self.blend, self.fixed = blend, fixed

    def weigh(self, router: Router, x: Tensor, heads: Tensor) -> Tensor:
        """The outputs of the heads side by side, [B, T, H · e], as much as each counts."""
        gate = router.stays() if self.fixed else 1 + self.blend * (router(x, self.real) - 1)
        return (heads.unflatten(-1, (len(router.usage), -1)) * gate.unsqueeze(-1)).flatten(-2)


@contextmanager
def routed(model: nn.Module, places: Sequence[Site], groups: Sequence[int], seed: int) -> Iterator[Routing]:
    """Route the heads of a text encoder in here, as many in each block as `groups` says."""
    generator = torch.Generator().manual_seed(seed)
    feeds = [next(iter(place.feeds.values())) for place in places]
    routing = Routing(
        [
            Router(place, feed.in_features, count, generator)
            for place, feed, count in zip(places, feeds, groups, strict=True)
        ]
    )

    def told(module: nn.Module, args: tuple, named: dict[str, Any]) -> None:
        routing.real = named["attention_mask"].bool()

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(told, with_kwargs=True).remove)
        for place, feed, router in zip(places, feeds, routing.routers, strict=True):
            before, weigh = _hooks(routing, router)
            stack.callback(feed.register_forward_pre_hook(before).remove)
            stack.callback(place.reader.register_forward_pre_hook(weigh).remove)
        yield routing


def _hooks(routing: Routing, router: Router) -> tuple[Callable, Callable]:
    """What watches the input of a block's first projection, and what weighs the heads before the last one."""
    entering: list[Tensor] = []

    def before(module: nn.Module, args: tuple) -> None:
        entering[:] = args

    def weigh(module: nn.Module, args: tuple) -> tuple:
        return (routing.weigh(router, entering.pop(), args[0]),)

    return before, weigh
