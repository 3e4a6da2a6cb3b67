"""The Python API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tprune.errors import UserError
from tprune.methods import registry
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe, Stage, check_budget


def prune(
    model: Any,
    method: str,
    *,
    keep: float | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    positions: str | None = None,
    loadable: str = "any",
    allocate: str = "uniform",
    data: str | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    calibration: int | None = None,
    length: int | None = None,
    batch_size: int = 16,
    fit: str | None = None,
    recover: str | None = None,
    recover_data: str | None = None,
    state: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """Prune a loaded timm or transformers model.

    Args:
        model: edited in place (weights) or hooked (tokens, caches).
        method: an id, or "family/id" where several families have it.
        keep: fraction of tokens or cache entries kept.
        sparsity: fraction of weights removed; or `pattern`, "n:m".
        positions: "original" or "compact" position ids, for vlm also "gap" (original ids, tokens in their order); the
            paper's by default.
        loadable: "plain" for widths that stock transformers can load, "any" otherwise.
        allocate: how `sparsity` is shared out among matrices, as `--allocate`: "uniform", "global", "block", "owl",
            "erk", "tamp-das".
        data: calibration text, as `--data`; the built-in by default.
        tokenizer: of a language model, for calibration; its processor for a vision-language model, or for a
            vision model of transformers that is fitted.
        seed: of everything random.
        calibration, length: how many calibration sequences of how many tokens.
        batch_size: of calibration.
        fit: what a method that learns is fitted on, as `--fit`: "built-in", or a folder of class folders.
        recover: train what is left of a language model's weights afterwards, as `--recover`: "lora", "full".
        recover_data: the text for it, as `--recover-data`; the calibration part of `data` by default.
        state: what such a method learned before, instead: the tensors of its artifact, by name.
        settings: the method's own hyperparameters.

    Returns:
        A handle: a context manager that restores the model exactly (tokens, caches; weights that `fit` trained stay
        as they are), with `achieved()` and `per_layer()`.

    Raises:
        UserError: anything that does not fit.
    """
    from tprune.models.source import Source
    from tprune.models.subject import Subject
    from tprune.pipelines.run import pipeline

    fact = registry.find(method)
    stage = Stage(
        fact.family,
        fact.id,
        keep,
        sparsity,
        pattern,
        settings,
        positions,
        loadable,
        fit,
        allocate,
        recover,
        recover_data,
    )
    check_budget(stage)
    parameter = next(model.parameters())
    library = "transformers" if hasattr(model, "config") else "timm"
    recipe = Recipe(
        ModelSource("a model in memory"),
        (stage,),
        data=data,
        calibration=calibration,
        length=length,
        batch_size=batch_size,
        device=str(parameter.device),
        dtype=str(parameter.dtype).removeprefix("torch."),
        seed=seed,
    )
    driver = pipeline(recipe, stage, Progress())
    source = Source("a model in memory", "memory", "", library)
    subject = Subject(model, tokenizer, source)
    handle = driver.apply(subject, None, state)
    if recover is not None and state is None:
        handle.recovered = driver.recover(subject, handle, None)
    return handle


def keep_zeros(pruned: Any) -> Any:
    """A callback for transformers' `Trainer` that keeps pruned weights at zero while the model is fine-tuned.

        tprune.prune(model, "wanda", sparsity=0.5, tokenizer=tokenizer)   # gives a handle
        Trainer(model, ..., callbacks=[tprune.keep_zeros(handle)]).train()

    Args:
        pruned: the handle that `prune` gave back, or an output folder of the llm-weights family.

    Raises:
        UserError: there are no masks.
    """
    from tprune import artifact
    from tprune.models.finetune import KeepZeros
    from tprune.models.masks import masks_of

    if hasattr(pruned, "tensors"):
        return KeepZeros(masks_of(pruned.tensors(by_reference=True), "what was pruned"))
    if not artifact.is_artifact(pruned):
        raise UserError(f"{pruned} is not an output folder of tprune")
    file = Path(pruned) / artifact.TENSORS
    return KeepZeros(masks_of(artifact.read_tensors(file) if file.exists() else {}, str(pruned)))


def load(folder: str, device: str = "cpu") -> Any:
    """The model in an output folder, ready: weights loaded, run-time methods in place.

    The handle that put a run-time method there is `model.tprune_handle`; its `remove()` restores the dense model.
    """
    from tprune import artifact
    from tprune.pipelines.load import open_artifact

    if not artifact.is_artifact(folder):
        raise UserError(f"{folder} is not an output folder of tprune")
    opened = open_artifact(folder, Progress(), device, whole=True)
    opened.subject.model.tprune_handle = opened.handles[-1]
    return opened.subject.model
