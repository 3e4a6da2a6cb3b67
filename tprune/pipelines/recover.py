"""Training after pruning: next-token loss on text, zeros stay zeros, also those of earlier stages (`--recover`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tprune.data import text
from tprune.errors import UserError
from tprune.methods.fit import Plan
from tprune.methods.recovery import Full, Lora, Recovery, parse
from tprune.models import masks
from tprune.models.calibrate import rows_at_once
from tprune.models.encoder_decoder import fed, foretold
from tprune.models.gradients import asking_for
from tprune.models.lora import changed, low_rank
from tprune.models.matrix import Matrix
from tprune.models.subject import Subject
from tprune.pipelines.fit import processes
from tprune.pipelines.fit_loop import Batches, Loop
from tprune.progress import Progress

if TYPE_CHECKING:
    from tprune.pipelines.llm_weights import LlmWeights
    from tprune.pipelines.weights_report import WeightHandle

TRAINED = "trained/"
"""Prefix of what a record by reference holds of trained parameters."""


@dataclass(eq=False)
class Steps:
    """What the loop asks beside the loss: nothing is drawn, and zeros are kept.

    Attributes:
        held: matrices and where they are zero, which they are again after every step.
        generator: set by the loop.
    """

    held: list[tuple[Matrix, Tensor]]
    generator: torch.Generator | None = None

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """All that is trained, alike."""
        return [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]

    def settle(self, done: float) -> None:
        """After a step: what moved away from zero goes back."""
        masks.remove(self.held)


class NextToken(nn.Module):
    """A language model and its loss, as the loop trains them: what of it asks for gradients."""

    def __init__(self, model: nn.Module, fit: Steps):
        super().__init__()
        self.model, self.fit = model, fit

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The mean loss over the predicted tokens of sequences [b, L]; beside an encoder, over their second half."""
        device = next(self.model.parameters()).device
        given, labels = fed(self.model, inputs.to(device)), foretold(self.model, labels.to(device))
        return {"next token": self.model(**given, labels=labels, use_cache=False).loss}


def check(driver: LlmWeights) -> Recovery:
    """What the stage asks for.

    Raises:
        UserError: an unknown name or setting, a package that is missing, a precision that learns nothing, or a method
            that puts matrices around those it prunes.
    """
    stage, recipe = driver.stage, driver.recipe
    asked = parse(stage.recover)
    if driver.method.wraps:
        raise UserError(
            f"--recover {stage.recover}: {stage.method} puts matrices around those it prunes, which are not trained; "
            "leave it out"
        )
    if asked.needs and importlib.util.find_spec(asked.needs) is None:
        raise UserError(
            f"--recover {stage.recover} needs the {asked.needs} library: pip install {asked.needs}"
        )
    if isinstance(asked, Full) and recipe.dtype != "float32":
        raise UserError(
            f"--recover {stage.recover}: small steps are lost in {recipe.dtype}; give --dtype float32 or --recover lora"
        )
    return asked


def check_precision(driver: LlmWeights) -> None:
    """Refuse a precision in which small steps are lost, of methods that train the weights themselves.

    Raises:
        UserError: with the mend.
    """
    asked, dtype = driver.method.regularised, driver.recipe.dtype
    trains = driver.method.learns != "no" or (asked is not None and asked.epochs)
    if trains and dtype != "float32":
        raise UserError(
            f"--dtype {dtype}: {driver.method.id} trains the weights, and small steps are lost; give --dtype float32"
        )


def recover(driver: LlmWeights, subject: Subject, handle: WeightHandle, work: Path | None) -> dict[str, Any]:
    """Train a pruned model on the calibration part of the stage's text, or of the recipe's.

    Returns:
        The facts for the report.
    """
    stage, recipe = driver.stage, driver.recipe
    source = text.read(stage.recover_data or recipe.data, "calibration")
    tokens = text.windows(source, driver.tokenizer(subject), driver.length, None, "--recover-data")
    recovering = Recovering(
        check(driver),
        subject.model,
        text.Sequences(tokens, source.protocol),
        recipe.batch_size,
        recipe.seed,
        None if work is None else work / f"stage-{recipe.stages.index(stage)}-recovery.safetensors",
        driver.progress,
    )
    facts = recovering.run()
    trained = changed(subject.model) if isinstance(recovering.recovery, Lora) else None
    handle.edits |= {
        TRAINED + name: parameter.data.cpu()
        for name, parameter in subject.model.named_parameters()
        if trained is None or name in trained
    }
    return facts | {"data": source.protocol, "sequences": len(tokens)}


def split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A record as the edits of pruning, and what was trained after it."""
    trained = {name: tensor for name, tensor in state.items() if name.startswith(TRAINED)}
    return {name: tensor for name, tensor in state.items() if name not in trained}, trained


@torch.no_grad()
def put_back(model: nn.Module, trained: Mapping[str, Tensor]) -> None:
    """Give a model that is pruned again the parameters that were trained."""
    own = dict(model.named_parameters())
    for name, tensor in trained.items():
        own[name.removeprefix(TRAINED)].copy_(tensor)


@dataclass(eq=False)
class Recovering:
    """What is trained, how and on what.

    Attributes:
        recovery: how.
        model: pruned.
        data: the training text.
        batch_size: at most so many sequences go through the model together.
        seed: of the order, and of low-rank factors.
        file: of the checkpoint, or None.
        progress: where to say what goes on.
    """

    recovery: Recovery
    model: nn.Module
    data: text.Sequences
    batch_size: int
    seed: int
    file: Path | None
    progress: Progress

    def run(self) -> dict[str, Any]:
        """Train; the facts for the report."""
        asked, model = self.recovery, self.model
        together = rows_at_once(
            self.batch_size, self.data.tokens.shape[1], model.get_input_embeddings().weight.device
        )
        plan = Plan(
            asked.epochs,
            asked.batch,
            asked.lr,
            warmup=asked.warmup,
            weight_decay=asked.weight_decay,
            at_once=together,
        )
        accelerator = processes(model, plan.batch, f"--recover {asked.id}:batch")
        share = accelerator.process_index, accelerator.num_processes
        batches = Batches(self.data, None, plan.batch, self.seed, share)
        held = masks.zeros(model)
        with torch.enable_grad(), self._trained(held):
            learner = NextToken(model, Steps(held if isinstance(asked, Full) else []))
            loop = Loop(learner, plan, len(self.data), self.file, self.progress, "sequences")
            loop.run(batches, accelerator, self.seed)
        return {"kind": asked.id, **asked.settings(), **loop.figures(), "seconds": round(loop.seconds, 1)}

    @contextmanager
    def _trained(self, held: list[tuple[Matrix, Tensor]]) -> Iterator[None]:
        """What is trained asks for gradients in here, and is the model's own afterwards."""
        asked, model = self.recovery, self.model
        if isinstance(asked, Full):
            with asking_for(model, model.parameters()):
                yield
        else:
            with (
                asking_for(model, ()),
                low_rank(model, asked.rank, asked.alpha, self.seed, masks.kept(held)),
            ):
                yield
