"""The driver of `tprune llm-context`: a language model's prompt tokens and its key-value cache."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tprune.core.budget import Stage
from tprune.data import passkey, text
from tprune.errors import UserError
from tprune.evaluate.context import cache_bytes, context_length, score_continuations
from tprune.evaluate.cost import flops, interleaved, peak_memory
from tprune.evaluate.passkey import accuracy, retrieve
from tprune.evaluate.perplexity import perplexity
from tprune.evaluate.stopwatch import Stopwatch
from tprune.methods.cache import CacheMethod
from tprune.methods.tokens import Shape
from tprune.models.cache import prunable_layers
from tprune.models.cache_fit import cache_shape
from tprune.models.choosing import Choosing
from tprune.models.compress import Compression
from tprune.models.decoder import DecoderDriver
from tprune.models.heads import CascadingDriver
from tprune.models.probe import Probing
from tprune.models.recurrent import RecurrentDriver, admit, is_recurrent, logits_behind
from tprune.models.revive import RevivingDriver, can_revive
from tprune.models.subject import Subject, twin
from tprune.models.text_encoder import is_encoder
from tprune.pipelines.base import Handle, Pipeline, Quality, Sample, Workload
from tprune.pipelines.context_handle import CacheHandle, PrefillHandle
from tprune.pipelines.context_prompts import noise, prompt_tokens, window_length
from tprune.pipelines.learned import untuned
from tprune.pipelines.tokens import for_timing, solve

STEPS = 16
"""Tokens generated in the timed call."""
PROBED = 8
"""Tokens after the context whose logits the probe stores."""


class ContextPipeline(Pipeline):
    """Load, measure and prune what a language model remembers of its context."""

    family = "llm-context"
    default_limit = 2
    fitted: dict[str, Any] | None = None
    lessons: text.Sequences | None = None

    def check(self) -> None:
        """A fit is asked for where there is one to make."""
        self.method.check_fit(self.stage.fit)

    def prepare(self, subject: Subject) -> None:
        """Read windows of evaluation text, or hide pass keys in it; text encoders are refused."""
        if is_encoder(subject.model.config):
            admit(self.method, subject.model)
        self.length = window_length(subject.model, self.recipe.length)
        self.windows, self.prompts, self.protocol = None, None, {}
        if self.stage.fit is not None and self.method.state is None:
            self.lessons = self.read_lessons(subject)
            self.progress.say(f"{len(self.lessons):,} sequences to learn from")
        self.say_unfitted()
        if subject.processor is None:
            return
        if self.recipe.data in passkey.SOURCES:
            inside, limit = passkey.SOURCES[self.recipe.data], self.recipe.limit or passkey.PROMPTS
            read = text.read(None, "evaluation")
            self.prompts = passkey.hide(read, subject.processor, self.length, limit, inside, self.recipe.seed)
            self.protocol = read.protocol | {
                "source": self.recipe.data,
                "prompts": limit,
                "length": self.length,
            }
            return
        read = text.read(self.recipe.data, "evaluation")
        limit = self.recipe.limit or self.default_limit
        self.windows = text.windows(read, subject.processor, self.length, limit)
        self.protocol = read.protocol | {
            "windows": len(self.windows),
            "context": context_length(self.length),
            "scored": self.length - context_length(self.length),
        }

    def evaluate(self, subject: Subject) -> Quality:
        """Perplexity of the last quarter of every window, the first three quarters being in the cache only.

        Of hidden pass keys: how many are found.
        """
        with self.counting():
            return self.continuations(subject) if self.prompts is None else self.keys(subject)

    def keys(self, subject: Subject) -> Quality:
        """Of hidden pass keys: how many are found."""
        found = retrieve(
            subject.model, self.prompts, lambda some: self.progress.track(some, "asking", len(some))
        )
        return Quality(accuracy(self.prompts, found), torch.tensor(found).long())

    def continuations(self, subject: Subject) -> Quality:
        """Perplexity of the last quarter of every window."""
        if self.windows is None:
            raise UserError(
                f"{subject.source.name} comes without a tokenizer; add its files (tokenizer.json and the like), or "
                "measure cost only with --no-eval"
            )
        losses, predictions, held = score_continuations(
            subject.model,
            self.windows,
            self.recipe.batch_size,
            lambda chunks: self.progress.track(chunks, "scoring", len(chunks)),
        )
        return Quality({"perplexity": perplexity(losses), "cache_mb": held / 2**20}, predictions)

    def workload(self, subject: Subject) -> Workload:
        """The prefill of one context and a few generated tokens."""
        context = context_length(self.length)
        tokens = noise(subject.model, context, self.recipe.seed) if self.windows is None else self.windows[:1]
        tokens = tokens[:, :context].to(subject.device)

        def run() -> None:
            cache = DynamicCache(config=subject.model.config)
            ids = tokens
            for _ in range(STEPS + 1):
                logits = logits_behind(subject.model, cache, ids, logits_to_keep=1)
                ids = logits[:, -1:].argmax(-1)

        return Workload(run, context + STEPS, "tokens")

    def apply(self, subject: Subject, work: Path | None, state: dict[str, Tensor] | None = None) -> Handle:
        """Put the method in place."""
        admit(self.method, subject.model)
        positions = self.stage.positions or self.method.positions
        if isinstance(self.method, CacheMethod) and self.stage.keep is None:
            raise UserError(f"{self.stage.method} needs --keep R, the fraction of cache entries that stay")
        self.learn(subject, work, state)
        if isinstance(self.method, CacheMethod):
            compact = positions == "compact"
            given = subject.model, self.method, self.stage.keep, self.recipe.seed, compact
            if self.method.chooses:
                return CacheHandle(Choosing(*given), subject.model, self.fitted)
            asks = self.method.probe() is not None
            compression = Probing(*given, subject.processor) if asks else Compression(*given)
            return CacheHandle(compression, subject.model, self.fitted)
        given = subject.model, self.method, prompt_tokens, partial(self.stages, subject.model)
        driver = self.driver(subject.model)(*given, positions=positions)
        self.handle = PrefillHandle(driver, self.stage.keep, self.fitted)
        return self.handle

    def stages(self, model: nn.Module, tokens: int) -> tuple[Stage, ...]:
        """Where tokens leave a prompt with so many that may."""
        depth = model.config.get_text_config(decoder=True).num_hidden_layers
        return solve(self.method, Shape(depth, tokens), self.stage.keep)

    def plan(self, subject: Subject) -> None:
        """The prompts have room for the budget."""
        admit(self.method, subject.model)
        lengths = {context_length(self.length)}
        if self.prompts is not None:
            lengths = {len(prompt.context) for prompt in self.prompts}
        for length in sorted(lengths):
            if not isinstance(self.method, CacheMethod):
                self.stages(subject.model, length - 1)
            elif self.stage.keep is not None and not self.method.chooses:
                layers = len(prunable_layers(subject.model.get_decoder().config))
                self.method.planned(length, layers, self.stage.keep)

    def driver(self, model: nn.Module) -> type[DecoderDriver]:
        """What runs a token method in this kind of model."""
        if is_recurrent(model):
            return RecurrentDriver
        if self.method.revives() and can_revive(model):
            return RevivingDriver
        return CascadingDriver if self.method.cascades else DecoderDriver

    def learn(self, subject: Subject, work: Path | None, state: dict[str, Tensor] | None) -> None:
        """Bind what the method learned before, or let it learn, where a fit is asked for."""
        if state or (state is not None and self.stage.fit is not None):
            self.method = self.method.bind(untuned(subject, state))
        self.method.check_fit(self.stage.fit)
        if self.stage.fit is None or self.method.state is not None:
            return
        from tprune.pipelines.context_course import ContextCourse
        from tprune.pipelines.fit import Fitting

        lessons = self.lessons or self.read_lessons(subject)
        course = ContextCourse(self.method, subject, lessons)
        fitting = Fitting(self.method, self.stage.keep, self.recipe.seed, course, work, self.progress)
        self.method, self.fitted = fitting.run()

    def read_lessons(self, subject: Subject) -> text.Sequences:
        """What `--fit` names.

        Raises:
            UserError: no such text, one too short, or a model without a tokenizer.
        """
        if subject.processor is None:
            raise UserError(
                f"{self.method.id} is fitted to text, which takes a tokenizer: copy its files to the model, or give "
                "tokenizer=TOKENIZER"
            )
        return text.training(self.stage.fit, subject.processor, self.method.sequence)

    def probe(self, subject: Subject) -> dict[str, Tensor]:
        """A context of random tokens, and the logits of some tokens after it."""
        length = window_length(subject.model, self.recipe.length)
        context = context_length(length)
        ids = noise(subject.model, context + min(PROBED, length - context), self.recipe.seed).to(
            subject.device
        )
        cache = DynamicCache(config=subject.model.config)
        with torch.no_grad():
            logits_behind(subject.model, cache, ids[:, :context], logits_to_keep=1)
            logits = logits_behind(subject.model, cache, ids[:, context:])
        return {"input": ids.cpu(), "output": logits.float().cpu()}

    def describe_data(self) -> dict[str, Any]:
        """Which text."""
        return self.protocol

    def pictures(self, subject: Subject, handle: Handle, sample: Sample) -> list[Any]:
        """A prompt with every token shaded by how many layers and heads keep it."""
        from tprune.pipelines.context_pictures import of_context

        return of_context(self, subject, handle, sample)

    def bench(self, subject: Subject, rounds: int) -> dict[str, Any]:
        """Prefill and the decode steps after it, dense and pruned in turn; then the method's own share, apart."""
        length = window_length(subject.model, self.recipe.length)
        ids = noise(subject.model, length + 1, self.recipe.seed).to(subject.device)
        models = {"dense": twin(subject.model), "pruned": subject.model}
        if self.method.learns == "required":
            shape = cache_shape(subject.model)
            self.method = for_timing(self.method, shape, self.recipe.seed, subject.device)
        handle = self.apply(subject, None)
        caches: dict[str, DynamicCache] = {}

        def prefill(name: str) -> None:
            caches[name] = DynamicCache(config=subject.model.config)
            logits_behind(models[name], caches[name], ids[:, :length], logits_to_keep=1)

        def decode(name: str) -> None:
            logits_behind(models[name], caches[name], ids[:, length:])

        times = interleaved(
            {f"prefill_{name}": lambda name=name: prefill(name) for name in models}, subject.device, rounds
        )
        held = {name: cache_bytes(cache) / 2**20 for name, cache in caches.items()}
        times |= interleaved(
            {f"decode_{name}": lambda name=name: decode(name) for name in models},
            subject.device,
            8 * rounds,
            warmup=3,
        )
        parts = {"prefill": prefill, "decode": decode}
        counted = {name: flops(lambda name=name: prefill(name)) for name in models}
        memory = {name: peak_memory(lambda name=name: prefill(name), subject.device) for name in models}
        theory = counted["dense"] / counted["pruned"]
        measured = median(times["prefill_dense"]) / median(times["prefill_pruned"])
        for part, work in handle.scoring().items():
            with torch.no_grad(), Stopwatch(*work, subject.device) as watch:
                for _ in range(2 if part == "prefill" else 8):
                    watch.lap(lambda part=part: parts[part]("pruned"))
            times[f"scoring_{part}"] = watch.seconds
        handle.remove()
        return {
            "times": times,
            "ratios": {f"{part}_pruned_to_dense": [f"{part}_pruned", f"{part}_dense"] for part in parts},
            "tokens": length,
            "cache_mb_dense": held["dense"],
            "cache_mb_pruned": held["pruned"],
            "memory": memory,
            "prefill_flops": counted,
            "prefill_speedup_flops": theory,
            "prefill_speedup_measured": measured,
            "prefill_speedup_ratio": measured / theory,
        }


PIPELINE = ContextPipeline
