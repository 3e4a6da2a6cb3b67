"""Pruning the heads of a text encoder by what a router takes while both are trained (`methods.weights.Routed`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tprune.errors import UserError
from tprune.methods.fit import Plan
from tprune.methods.weights import Routed, WeightBudget
from tprune.models import units
from tprune.models.blocks import Decoder
from tprune.models.gradients import USAGE, asking_for
from tprune.models.routed import Routing, routed
from tprune.models.subject import Subject
from tprune.pipelines import prune_weights
from tprune.pipelines.fit import processes
from tprune.pipelines.fit_loop import Loop
from tprune.pipelines.journal import Journal
from tprune.pipelines.learned_masks import lessons, trainable
from tprune.pipelines.recover import TRAINED
from tprune.pipelines.weights_report import WeightHandle, sizes

if TYPE_CHECKING:
    from tprune.pipelines.llm_weights import LlmWeights


class Choosing:
    """What the loop asks of a model whose heads are routed.

    Attributes:
        asked: how.
        routing: of the model.
        generator: set by the loop; nothing is drawn.
    """

    generator: torch.Generator

    def __init__(self, asked: Routed, routing: Routing):
        self.asked, self.routing = asked, routing
        self.settle(0.0)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Routers with their own learning rate, and the model's parameters."""
        routers = [router.weight for router in self.routing.routers]
        return [
            {"params": routers, "lr": self.asked.router_lr},
            {"params": [one for one in model.parameters() if one.requires_grad]},
        ]

    def settle(self, done: float) -> None:
        """How far routing is when `done` of the training is over."""
        asked = self.asked
        self.routing.settle(min(1.0, done / asked.grow) if asked.grow else 1.0, done >= asked.choose)

    def check(self, steps: int) -> None:
        """Refuse so few `steps` that none of them counts which heads are taken.

        Raises:
            UserError: with the mend.
        """
        asked = self.asked
        if not any(asked.grow <= step / steps < asked.choose for step in range(steps)):
            raise UserError(
                f"{steps} steps: in none of them is routing full (--set grow={asked.grow:g}) before heads are chosen "
                f"(--set choose={asked.choose:g}); give more epochs, or a smaller grow"
            )

    def penalty(self) -> dict[str, Tensor]:
        """Nothing comes to the loss."""
        return {}


def learn(
    driver: LlmWeights, subject: Subject, decoder: Decoder, budget: WeightBudget, work: Path | None
) -> WeightHandle:
    """Train an encoder under routing on what `--fit` names, and take out the heads that are used least.

    Raises:
        UserError: an encoder without heads that can go, or without classes.
        BudgetError: as the method's `left`.
    """
    journal = Journal(work, f"stage-{driver.recipe.stages.index(driver.stage)}")
    if not budget.sparsity:
        return prune_weights.prune(driver, decoder, budget, None, journal)
    places = [units.site(decoder, index, "heads") for index in range(len(decoder.blocks))]
    if None in places:
        raise UserError(f"{driver.method.id}: the heads of {type(decoder.model).__name__} cannot be removed")
    trained = trainable(decoder.model)
    usage, facts = _train(driver, subject, decoder, budget, places, list(trained.values()), work)
    handle = prune_weights.prune(driver, decoder, budget, None, journal, {USAGE: usage})
    own = dict(decoder.model.named_parameters())
    handle.edits |= {TRAINED + name: own[name].data.cpu() for name in trained}
    handle.fitted = facts
    return handle


def _train(
    driver: LlmWeights,
    subject: Subject,
    decoder: Decoder,
    budget: WeightBudget,
    places: list[units.Site],
    trained: list[nn.Parameter],
    work: Path | None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """How often each head was taken, [H] by the projection that reads them, and the facts for the report."""
    method, recipe, asked = driver.method, driver.recipe, driver.method.routed
    course = lessons(driver, subject)
    left = method.left(
        [place.count for place in places], places[0].cost, sum(sizes(decoder)), budget.sparsity
    )
    plan = Plan(asked.epochs, asked.batch, asked.lr, linear=True, clip=1.0, at_once=course.at_once)
    file = None if work is None else work / f"stage-{recipe.stages.index(driver.stage)}-heads.safetensors"
    accelerator = processes(decoder.model, plan.batch)
    share = accelerator.process_index, accelerator.num_processes
    with (
        torch.enable_grad(),
        asking_for(decoder.model, trained),
        routed(decoder.model, places, left, recipe.seed) as routing,
    ):
        fit = Choosing(asked, routing)
        learner = course.learner(fit)
        learner.routing = routing
        loop = Loop(learner, plan, len(course.data), file, driver.progress, course.unit)
        fit.check(loop.steps)
        loop.run(course.batches(plan.batch, recipe.seed, share), accelerator, recipe.seed)
    usage = {
        place.reader_name: router.usage.detach()
        for place, router in zip(places, routing.routers, strict=True)
    }
    return usage, {"data": course.data.protocol, **loop.figures(), "seconds": round(loop.seconds, 1)}
