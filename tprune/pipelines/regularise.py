"""Training of a dense model before structure leaves it: what will go is penalised, what stays takes it over."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tprune.core.select import complement
from tprune.core.weights import StructureEdit
from tprune.data import text
from tprune.methods.fit import Plan
from tprune.models import masks, units
from tprune.models.blocks import Decoder
from tprune.models.calibrate import rows_at_once
from tprune.models.gradients import asking_for
from tprune.pipelines.fit import processes
from tprune.pipelines.fit_loop import Batches, Loop
from tprune.pipelines.journal import Journal
from tprune.pipelines.recover import NextToken, Steps

if TYPE_CHECKING:
    from tprune.pipelines.llm_weights import LlmWeights


class Penalised(NextToken):
    """A language model, its loss, and what is to be paid for the units that will go."""

    def __init__(
        self, model: nn.Module, fit: Steps, decoder: Decoder, edits: Sequence[StructureEdit], penalty: float
    ):
        super().__init__(model, fit)
        self.leaving = partial(leaving_norms, decoder, edits)
        self.penalty = penalty

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The mean loss over the predicted tokens of sequences [b, L], and the penalty."""
        return super().forward(inputs, labels) | {"penalty": self.penalty * self.leaving().sum()}


def leaving_norms(decoder: Decoder, edits: Sequence[StructureEdit]) -> Tensor:
    """The norm of every unit that the edits remove, over all its weights in its dependency group: [units]."""
    norms = []
    for edit in edits:
        for kind, keep in edit.keep.items():
            place = units.site(decoder, edit.block, kind)
            (goes,) = complement(keep.unsqueeze(0), place.count)
            weights = (
                units.by_unit(matrix.cut(matrix.parameter), axis, place.count)
                for matrix, axis in units.members(decoder, edit.block, place)
            )
            squares = [weight[goes.to(weight.device)].float().square().sum((1, 2)) for weight in weights]
            norms.append(torch.stack(squares).sum(0).clamp_min(1e-12).sqrt())
    return torch.cat(norms)


def regularise(
    driver: LlmWeights, decoder: Decoder, tokens: Tensor, journal: Journal, edits: Sequence[StructureEdit]
) -> None:
    """Train the matrices of all blocks on calibration sequences int64 [N, L], under the method's penalty."""
    asked, model, recipe = driver.method.regularised, decoder.model, driver.recipe
    device = model.get_input_embeddings().weight.device
    together = rows_at_once(recipe.batch_size, tokens.shape[1], device)
    plan = Plan(asked.epochs, asked.batch, asked.lr, at_once=together)
    accelerator = processes(model, plan.batch, "--set batch")
    share = accelerator.process_index, accelerator.num_processes
    file = None if journal.folder is None else journal.folder / f"{journal.name}.safetensors"
    data = text.Sequences(tokens, {})
    with torch.enable_grad(), asking_for(model, matrices(decoder).values()):
        learner = Penalised(model, Steps(masks.zeros(model)), decoder, edits, asked.penalty)
        loop = Loop(learner, plan, len(data), file, driver.progress, "sequences")
        loop.run(Batches(data, None, plan.batch, recipe.seed, share), accelerator, recipe.seed)


def matrices(decoder: Decoder) -> dict[str, nn.Parameter]:
    """The parameters of the blocks' matrices, by name."""
    every = range(len(decoder.blocks))
    return {one.parameter_name: one.parameter for index in every for one in decoder.matrices(index)}
