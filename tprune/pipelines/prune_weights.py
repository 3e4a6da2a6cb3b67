"""What a stage of llm-weights does to a decoder: prune it, or make stored edits again; and the handle of either."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tprune.errors import BudgetError, UserError
from tprune.methods.levels import LevelMethod
from tprune.methods.weights import WeightBudget
from tprune.models import factored, masks, shapes, shared, units
from tprune.models.blocks import Decoder
from tprune.models.embeddings import TripleSets
from tprune.models.gradients import (
    MEASURED,
    POWERS,
    SENSITIVITY,
    TRIPLES,
    gradient_statistics,
    sensitivities,
)
from tprune.models.subject import pages_of
from tprune.pipelines import share
from tprune.pipelines.allocation import Sharing
from tprune.pipelines.base import Achieved
from tprune.pipelines.journal import Journal
from tprune.pipelines.levels import LevelPruner
from tprune.pipelines.recover import TRAINED, put_back, split
from tprune.pipelines.regularise import matrices, regularise
from tprune.pipelines.stream import BlockPruner, Gradients
from tprune.pipelines.structure import StructurePruner
from tprune.pipelines.structure_record import REMOVED, edits_of, record
from tprune.pipelines.weights_kinds import Samples
from tprune.pipelines.weights_report import (
    WeightHandle,
    mask_row,
    pattern_share,
    sizes,
    structure_rows,
)
from tprune.pipelines.whole import WholePruner
from tprune.progress import Progress

if TYPE_CHECKING:
    from tprune.pipelines.llm_weights import LlmWeights


def prune(
    driver: LlmWeights,
    decoder: Decoder,
    budget: WeightBudget,
    tokens: Samples | None,
    journal: Journal,
    learned: Gradients | None = None,
) -> WeightHandle:
    """Prune a decoder in place, calibrated on `tokens`; in evaluation mode, whatever mode it is in.

    Args:
        driver, decoder, budget, tokens, journal: what, by what, how much, and how to go on.
        learned: what a training before it says of structure, as `StructurePruner.gradients`.
    """
    structure = partial(_structure, learned=learned or {})
    scopes = {"block": _block_by_block, "model": structure, "whole": _in_rounds}
    training = decoder.model.training
    decoder.model.eval()
    try:
        return scopes[driver.method.scope](driver, decoder, budget, tokens, journal)
    finally:
        decoder.model.train(training)


def reload(driver: LlmWeights, decoder: Decoder, state: dict[str, Tensor]) -> WeightHandle:
    """Make stored edits again: on the dense model they all happen, on the pruned one they change nothing."""
    edits, trained = split(state)
    handle = _again(driver, decoder, edits)
    put_back(decoder.model, trained)
    return handle


def _again(driver: LlmWeights, decoder: Decoder, edits: dict[str, Tensor]) -> WeightHandle:
    if REMOVED in edits:
        shapes.apply(decoder, edits_of(edits))
        return WeightHandle(_kind_of_shapes(decoder), Achieved(float("nan")), [], edits, {})
    if pages_of(decoder.model) is None:
        for index in range(len(decoder.blocks)):
            masks.replay(decoder.matrices(index), edits)
    return _masked(driver, decoder, edits, None)


def _block_by_block(
    driver: LlmWeights, decoder: Decoder, budget: WeightBudget, tokens: Samples | None, journal: Journal
) -> WeightHandle:
    """Matrix by matrix, while the model streams by."""
    method, progress = driver.method, driver.progress
    start, journal = share.begin(driver, decoder, tokens, journal)
    gradients = _gradients(driver, decoder, tokens)
    rule, shares = driver.allocation(), None
    if rule is not None and budget.sparsity > 0:
        sharing = Sharing(decoder, rule, method, gradients, progress)
        shares = sharing.run(budget.sparsity, start, journal.part("shares"))
    calibration = start() if set(method.stats) - set(MEASURED) else None
    pruner = BlockPruner(
        decoder, method, budget, driver.recipe.seed, calibration, progress, shares, gradients
    )
    return _masked(driver, decoder, pruner.run(journal), budget)


def _in_rounds(
    driver: LlmWeights, decoder: Decoder, budget: WeightBudget, tokens: Samples, journal: Journal
) -> WeightHandle:
    """All matrices together, in rounds."""
    pruner = WholePruner(decoder, driver.method, budget, tokens, driver.progress)
    return _masked(driver, decoder, pruner.run(journal), budget)


def _structure(
    driver: LlmWeights,
    decoder: Decoder,
    budget: WeightBudget,
    tokens: Samples | None,
    journal: Journal,
    learned: Gradients,
) -> WeightHandle:
    """Heads, channels, halves and blocks.

    Raises:
        UserError: blocks of the model borrow from others, which may then not change their shape, or leave.
    """
    method = driver.method
    if any(shared.size(block) for block in decoder.blocks):
        raise UserError(
            f"blocks of this model borrow weights of others, and {method.id} removes structure; do that before they "
            "borrow, or choose a method that masks weights, such as wanda"
        )
    before = sizes(decoder)
    everything = _parameters(decoder)
    gradients = _gradients(driver, decoder, tokens) | learned
    reads = set(method.stats) - set(MEASURED) or method.measures or method.teacher
    asked, train = method.regularised, None
    if asked is not None and asked.epochs and budget.sparsity:
        train = partial(regularise, driver, decoder, tokens, journal.part("regularised"))
    kind = LevelPruner if isinstance(method, LevelMethod) else StructurePruner
    pruner = kind(
        decoder,
        method,
        budget,
        driver.calibration(decoder, tokens, journal.folder) if reads else None,
        driver.stage.loadable == "plain",
        driver.progress,
        gradients,
        driver.max_minutes,
        driver.recipe.seed,
        train,
        driver.known_losses,
    )
    edits, view = pruner.run(journal)
    after = sizes(decoder)
    if budget.sparsity and after == before:
        costs = (
            cost
            for block in view.blocks
            for cost in (*block.halves.values(), *(unit.cost for unit in block.removable().values()))
        )
        least = min(costs) / sum(before)
        raise BudgetError(
            f"--sparsity {budget.sparsity:g} rounds to no unit at all; one unit is {least:.2g} of the weights",
            least,
        )
    details = {"over_all_parameters": 1 - _parameters(decoder) / everything}
    found = Achieved(1 - sum(after) / sum(before), details)
    rows = structure_rows(edits, view, after)
    kept = record(edits)
    if train is not None:
        kept |= {TRAINED + name: held.data.cpu() for name, held in matrices(decoder).items()}
    return WeightHandle(_kind_of_shapes(decoder), found, rows, kept, {})


def _gradients(driver: LlmWeights, decoder: Decoder, tokens: Samples | None) -> Gradients:
    """What the method reads of the dense model's gradients; nothing where it reads none."""
    stats = driver.method.stats
    kinds, found = [kind for kind in stats if kind in POWERS], {}
    if kinds:
        sequences = driver.progress.track(tokens, "gradients")
        found = gradient_statistics(decoder, sequences, kinds, driver.classes)
    if SENSITIVITY in stats:
        places = [
            units.site(decoder, index, kind)
            for index in range(len(decoder.blocks))
            for kind in driver.method.units
        ]
        readers = {place.reader_name: place.reader for place in places if place is not None}
        sequences = driver.progress.track(tokens, "gradients")
        found[SENSITIVITY] = sensitivities(decoder, sequences, driver.classes, readers)
    if TRIPLES in stats:
        found |= _of_triples(decoder, tokens, driver.progress)
    return found


def _of_triples(decoder: Decoder, sets: TripleSets, progress: Progress) -> Gradients:
    """Means of gradients over batches, and sums of their squares over the number of triples, of both sets.

    Four times as large as the prunable weights are in float32, on the CPU.
    """
    found: Gradients = {}
    for name, batches in (("domain", sets.domain), ("general", sets.general)):
        track = progress.track(batches, f"{name} gradients")
        known = gradient_statistics(decoder, track, ("gradient_mean", "gradient_square"))
        for square in known["gradient_square"].values():
            square.mul_(len(batches) / batches.triples)
        found |= {f"{name}_mean": known["gradient_mean"], f"{name}_square": known["gradient_square"]}
    return found


def _masked(
    driver: LlmWeights, decoder: Decoder, edits: dict[str, Tensor], budget: WeightBudget | None
) -> WeightHandle:
    """The handle of matrices pruned by masks; without a budget, of stored ones."""
    rows = [mask_row(decoder, index, edits) for index in range(len(decoder.blocks))]
    weights, gone = (sum(row[name] for row in rows) for name in ("weights", "removed"))
    if budget is not None and budget.sparsity > 0 and gone == 0:
        raise BudgetError(
            f"--sparsity {budget.sparsity:g} rounds to no weight at all in this model; its rows are "
            f"{decoder.matrices(0)[0].shape[1]} wide: ask for more"
        )
    factored.write_config(decoder)
    details: dict[str, Any] = {"over_all_parameters": gone / _parameters(decoder)}
    if budget is not None and budget.pattern:
        details["groups_within_pattern"] = pattern_share(
            decoder, budget.pattern, driver.method.groups_outputs
        )
    plain = driver.stage.loadable == "plain"
    beside = {} if plain else masks.only_masks(edits)
    kind = "wrapped" if hasattr(decoder.config, "tprune") else "plain" if plain else "masked"
    return WeightHandle(kind, Achieved(gone / weights, details), rows, edits, beside)


def _kind_of_shapes(decoder: Decoder) -> str:
    """Whether stock transformers builds such a model."""
    return "wrapped" if hasattr(decoder.config, "tprune") else "plain"


def _parameters(decoder: Decoder) -> int:
    return sum(parameter.numel() for parameter in decoder.model.parameters())
