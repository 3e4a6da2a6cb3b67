"""The llm-weights family: weights, heads, channels and blocks of a transformers decoder."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tprune.data import text
from tprune.errors import UserError
from tprune.evaluate.perplexity import perplexity, score_windows
from tprune.methods.allocate import Allocation
from tprune.methods.selective import SelectiveMethod
from tprune.methods.weights import WeightBudget
from tprune.models import factored, save
from tprune.models.blocks import Decoder
from tprune.models.calibrate import Stream
from tprune.models.encoder_decoder import EncoderDecoder, fed
from tprune.models.find import find_blocks
from tprune.models.load import in_timm
from tprune.models.source import Source
from tprune.models.subject import Subject
from tprune.models.text_encoder import is_encoder
from tprune.models.vision_blocks import check_structure, is_vision
from tprune.pipelines import learned_heads, learned_masks, memory, pair_weights, prune_weights, recover
from tprune.pipelines import stream as streaming
from tprune.pipelines.base import Handle, Pipeline, Quality, Sample, Workload
from tprune.pipelines.journal import Journal
from tprune.pipelines.weight_budget import allocation_of, budget_of
from tprune.pipelines.weights_kinds import Kind, Samples, Task, kind_of

LENGTH = 512
"""Tokens per sequence, of calibration and evaluation."""
CALIBRATION = 16
"""Calibration sequences: enough for the built-in model. The papers' 128 of 2,048 tokens, for models of billions of
weights, are `--calibration 128 --length 2048`."""
PROBE = (2, 16)
"""Rows and tokens of the probe stored in an artifact."""


class LlmWeights(Pipeline):
    """Load, calibrate, prune and measure a decoder."""

    family = "llm-weights"
    default_limit = 16
    kind: Kind | None = None
    """What is particular about a model that is not measured by text which it foretells, once `prepare` has seen one."""
    task: Task | None = None
    """What such a one is measured by."""
    classes: Tensor | None = None
    """int64 [N], of the calibration samples of a model that tells classes apart."""

    @property
    def length(self) -> int:
        """Tokens per sequence, of calibration and evaluation."""
        return self.recipe.length or LENGTH

    def check(self) -> None:
        """Refuse a missing budget, and whatever else of the stage does not go with its method."""
        if self.max_minutes is not None and not self.method.measures:
            raise UserError(
                f"--max-minutes {self.max_minutes:g}: {self.stage.method} does not search; leave it out"
            )
        if self.stage.loadable == "plain" and (self.method.wraps or not self.method.uniform):
            does = (
                "puts matrices around those it prunes"
                if self.method.wraps
                else "leaves blocks of different shapes"
            )
            raise UserError(
                f"--loadable plain: {self.stage.method} {does}, which stock transformers cannot load; leave it out, "
                "and load the result with tprune.load"
            )
        self.method.check_fit(self.stage.fit)
        self.budget()
        self.allocation()
        recover.check_precision(self)
        if self.stage.recover is not None:
            recover.check(self)
        if self.recipe.max_memory is not None:
            memory.check(self.recipe, self.method)

    def source(self) -> Source:
        """Where the model comes from; a name without an owner may be one of timm's."""
        found = super().source()
        if found.kind == "hub" and "/" not in found.name and in_timm(found.name):
            return replace(found, kind="timm", library="timm")
        return found

    def load(self) -> Subject:
        """The dense model, and what makes inputs for it."""
        return save.load_as(self.recipe, self.source(), self.family)

    def prepare(self, subject: Subject) -> None:
        """Cut the evaluation windows; refuse a model or a budget that does not fit before anything is measured."""
        decoder = self.decoder(subject.model)
        self.kind = self.kind_of(subject)
        if self.stage.pattern is not None:
            streaming.check_pattern(decoder, self.budget().pattern, self.method.groups_outputs)
        if self.kind is not None:
            self.task = self.kind.Task(self.recipe, subject, self.progress)
            return
        if subject.model.get_output_embeddings() is None:
            raise UserError(f"{self.recipe.model.name} has no language-modelling head: perplexity needs one")
        self.check_length(decoder)
        self.evaluation = text.read(self.recipe.data, "evaluation")
        limit = self.recipe.limit or self.default_limit
        self.windows = text.windows(self.evaluation, self.tokenizer(subject), self.length, limit)
        self.halves = pair_weights.protocol(decoder, self.length, self.progress)

    def decoder(self, model: torch.nn.Module) -> Decoder:
        """The model's blocks, with the matrices that the method is about.

        Raises:
            UserError: a model without blocks to prune, or not for the method.
        """
        found = find_blocks(model)
        if isinstance(found, EncoderDecoder):
            pair_weights.check(self.stage, self.method, model)
        both_ways = isinstance(found, EncoderDecoder) or is_vision(model) or is_encoder(found.config)
        if isinstance(self.method, SelectiveMethod) and both_ways:
            raise UserError(
                f"{self.method.id} looks at the attention of a decoder's last token; choose a method that does not for "
                f"this {type(model).__name__}, such as wanda"
            )
        if self.method.runs_on == ("encoder",) and not is_encoder(found.config):
            raise UserError(
                f"{self.method.id} prunes text encoders such as minilm-topics, and this is a "
                f"{found.config.model_type} model; choose a method for decoders, such as flap"
            )
        if self.method.scope == "model" and is_vision(model):
            check_structure(model)
        found.part = self.method.part
        return found

    def kind_of(self, subject: Subject) -> Kind | None:
        """The model's kind, where it is one with data of its own.

        Raises:
            UserError: the method, or an option, does not go with it.
        """
        found = kind_of(subject, self.recipe)
        if found is not None:
            found.check(self.stage, self.method, self.recipe)
        return found

    def check_length(self, decoder: Decoder) -> None:
        """Refuse sequences longer than the model's positions."""
        longest = getattr(decoder.config, "max_position_embeddings", None)
        if isinstance(decoder, EncoderDecoder) and longest is not None:
            longest *= len(decoder.entrances)  # each stack has half of a sequence
        if longest is not None and self.length > longest:
            raise UserError(f"--length {self.length}: this model has {longest} positions; give at most that")

    def tokenizer(self, subject: Subject) -> Any:
        """The model's tokenizer.

        Raises:
            UserError: there is none.
        """
        if subject.processor is None:
            raise UserError(
                f"{self.recipe.model.name} has no tokenizer, and text is needed; put its tokenizer files in the "
                "model's folder (or give tokenizer= in Python)"
            )
        return getattr(subject.processor, "tokenizer", subject.processor)

    def budget(self) -> WeightBudget:
        """What was asked; a UserError where it does not go with the method."""
        return budget_of(self.stage, self.method)

    def allocation(self) -> Allocation | None:
        """How the budget is shared out, as `allocation_of` has it."""
        return allocation_of(self.stage, self.method)

    def evaluate(self, subject: Subject) -> Quality:
        """Perplexity on the windows, and what is predicted for every token; or as the model's kind has it."""
        if self.task is not None:
            return self.task.evaluate(subject)
        if self.recipe.max_memory is not None:
            windows = self.calibration(self.decoder(subject.model), self.windows)
            losses, predictions = memory.score_paged(windows, self.recipe.max_memory, self.progress)
        else:
            losses, predictions = score_windows(
                subject.model,
                self.windows,
                self.recipe.batch_size,
                lambda chunks: self.progress.track(chunks, "perplexity"),
            )
        return Quality({"perplexity": perplexity(losses)}, predictions)

    def workload(self, subject: Subject) -> Workload:
        """The prefill of one window, with the logits of its last token; or a batch of other samples."""
        if self.task is not None:
            return self.task.workload(subject)
        window = self.windows[:1].to(subject.device)
        given: dict[str, Any] = fed(subject.model, window)
        if "logits_to_keep" in signature(subject.model.forward).parameters:
            given["logits_to_keep"] = 1
        return Workload(lambda: subject.model(**given, use_cache=False), window.numel(), "tokens")

    def calibration_tokens(self, subject: Subject, decoder: Decoder) -> Samples | None:
        """What calibrates; None where the method reads nothing."""
        kind = self.kind_of(subject)
        allocation = self.allocation()
        shared = allocation is not None and allocation.needs(self.method)
        reads = self.method.stats or self.method.measures or self.method.teacher or shared
        if not reads:
            return None
        if kind is not None:
            samples, self.classes = kind.calibration(self.recipe, subject, self.method, self.progress)
            return samples
        self.check_length(decoder)
        source = text.read(self.recipe.data, "calibration")
        count = self.recipe.calibration or CALIBRATION
        return text.sample(source, self.tokenizer(subject), self.length, count, self.recipe.seed)

    def calibration(self, decoder: Decoder, tokens: Samples, folder: Path | None = None) -> Stream:
        """The samples before the first block."""
        return memory.calibration(decoder, self.method, tokens, self.recipe, folder)

    def apply(self, subject: Subject, work: Path | None, state: dict[str, Tensor] | None = None) -> Handle:
        """Prune in place, or make stored edits again."""
        decoder = self.decoder(subject.model)
        if state is not None:
            return prune_weights.reload(self, decoder, state)
        self.check()
        self.kind_of(subject)
        if factored.sizes(decoder) and (self.method.wraps or self.method.scope != "block"):
            raise UserError(
                f"matrices stand around those of this model already; {self.stage.method} does not go with that"
            )
        budget = self.budget()
        streaming.check_pattern(decoder, budget.pattern, self.method.groups_outputs)
        if self.method.scope != "model" and budget.pattern is None:
            self.progress.say("unstructured masks: no speed-up is to be expected from dense kernels")
        if self.method.routed is not None:
            return learned_heads.learn(self, subject, decoder, budget, work)
        if self.method.scope == "trained":
            return self._learned(subject, decoder, budget, work)
        journal = Journal(work, f"stage-{self.recipe.stages.index(self.stage)}")
        tokens = self.calibration_tokens(subject, decoder)
        return prune_weights.prune(self, decoder, budget, tokens, journal)

    def _learned(self, subject: Subject, decoder: Decoder, budget: WeightBudget, work: Path | None) -> Handle:
        """Train the model with the scores that say what stays."""
        record, facts = learned_masks.learn(self, subject, decoder, budget.sparsity, work)
        edits, trained = recover.split(record)
        handle = prune_weights.reload(self, decoder, edits)
        handle.edits, handle.fitted = edits | trained, facts
        return handle

    def recover(self, subject: Subject, handle: Handle, work: Path | None) -> dict[str, Any]:
        """Train it on text as `--recover` says."""
        return recover.recover(self, subject, handle, work)

    def probe(self, subject: Subject) -> dict[str, Tensor]:
        """Random tokens, and the logits after the last two of each row; or as the model's kind has it."""
        kind = kind_of(subject, self.recipe)
        if kind is not None:
            return kind.probe(subject, self.recipe.seed)
        vocabulary = subject.model.get_input_embeddings().weight.shape[0]
        seeded = torch.Generator().manual_seed(self.recipe.seed)
        tokens = torch.randint(vocabulary, PROBE, generator=seeded)
        with torch.no_grad():
            given = fed(subject.model, tokens.to(subject.device))
            logits = subject.model(**given, use_cache=False).logits
        return {"input": tokens, "output": logits[:, -2:].float().cpu()}

    def pictures(self, subject: Subject, handle: Handle, sample: Sample) -> list[Any]:
        """Sparsity per block and module, and the widths that are left; no sample decides them."""
        from tprune.pipelines.weights_pictures import heading, of_handle

        return of_handle(heading(self.stage, self.recipe), handle.rows, handle.edits)

    def bench(self, subject: Subject, rounds: int) -> dict[str, Any]:
        """Seconds of pruning beside those of one plain pass of the calibration tokens, taken in turn."""
        from tprune.pipelines.bench_weights import bench

        if self.method.learns != "no":
            raise UserError(f"{self.stage.method} is trained, not calibrated: its passes are --set epochs=N")

        return bench(self, subject, rounds)

    def describe_data(self) -> dict[str, Any]:
        """The evaluation text, its windows, and what methods that calibrate are given beside it."""
        if self.task is not None:
            count = self.recipe.calibration or self.kind.CALIBRATION
            return self.task.protocol | {"calibration_sequences": count}
        return self.evaluation.protocol | {
            "windows": len(self.windows),
            "length": self.length,
            "calibration_sequences": self.recipe.calibration or CALIBRATION,
            **self.halves,
        }


PIPELINE = LlmWeights
