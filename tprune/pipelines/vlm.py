"""The driver of `tprune vlm`: image tokens of vision-language models, before or inside their decoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from tprune.core.budget import PROJECTOR, Stage
from tprune.data import questions
from tprune.methods.tokens import Shape, TokenMethod
from tprune.models import beside
from tprune.models import vlm as adapter
from tprune.models.clip import load_clip
from tprune.models.decoder import DecoderDriver
from tprune.models.image_cache import ImageCaches
from tprune.models.layer_inputs import check_positions
from tprune.models.projector import Projector
from tprune.models.prompts import noise_prompts
from tprune.models.subject import Subject
from tprune.pipelines import bench_vlm, question_task
from tprune.pipelines.base import Handle, Pipeline, Quality, Sample, Workload
from tprune.pipelines.learned import untuned
from tprune.pipelines.question_task import QuestionTask, prefill
from tprune.pipelines.tokens import for_timing, solve
from tprune.pipelines.vlm_handle import VlmHandle

NOMINAL_TOKENS = 576


class VlmPipeline(Pipeline):
    """Load, measure and prune a vision-language model."""

    family = "vlm"
    default_limit = question_task.QUESTIONS
    fitted: dict[str, Any] | None = None
    handle: VlmHandle | None = None

    def check(self) -> None:
        """A fit is asked for where there is one to make."""
        self.method.check_fit(self.stage.fit)

    def prepare(self, subject: Subject) -> None:
        """Read the questions; refuse a method that does not fit the model."""
        self.admit(adapter.anatomy(subject.model))
        self.task = QuestionTask(self.recipe, subject, self.progress)
        if self.stage.fit is not None and self.method.state is None:
            self.progress.say(f"{len(self.lessons):,} questions to learn from")
        self.say_unfitted()

    @cached_property
    def lessons(self) -> questions.Questions | questions.TrainingQuestions | questions.BoxedQuestions:
        """What `--fit` names, with the boxes that the method learns from."""
        found = questions.training(self.stage.fit)
        if self.method.labels in ("boxes", "foreground"):
            return questions.BoxedQuestions(found, self.method.labels == "foreground")
        return found

    def admit(self, parts: adapter.Anatomy) -> None:
        """Raise UserError where the model lacks what the method reads, or the budget is out of reach."""
        nominal = self.nominal(parts)
        self.method.check(nominal)
        self.stages(parts, self.acting, nominal.tokens)

    @property
    def acting(self) -> TokenMethod:
        """The method that runs: under --keep all its counts are fixed."""
        return self.method if self.stage.keep is None else self.method.counted()

    def nominal(self, parts: adapter.Anatomy) -> Shape:
        """What the method may know of an image of the default size."""
        return self.shape(parts, parts.tokens or NOMINAL_TOKENS)

    def shape(self, parts: adapter.Anatomy, tokens: int) -> Shape:
        """What the method may know of a prompt, or an image, with so many image tokens."""
        return Shape(
            parts.depth,
            tokens,
            heads=parts.heads,
            has_cls=parts.prefix > 0,
            width=parts.core.config.hidden_size,
            tower=adapter.tower_width(parts),
            patch=adapter.token_size(parts),
        )

    def evaluate(self, subject: Subject) -> Quality:
        """The fraction of answers given word for word, over all questions and for each kind."""
        with self.counting():
            return self.task.evaluate(subject)

    def workload(self, subject: Subject) -> Workload:
        """The prefill of a batch of prompts with a noise image each; of questions where what they show decides how many
        tokens are kept.
        """
        if not self.acting.varies():
            return self.task.workload(subject)
        size = min(self.recipe.batch_size, len(self.task.questions))
        inputs = self.task.inputs(subject, range(size))
        return Workload(partial(prefill, subject, inputs), size, "prompts")

    def apply(self, subject: Subject, work: Path | None, state: dict[str, Tensor] | None = None) -> VlmHandle:
        """Put the method in place."""
        parts = adapter.anatomy(subject.model)
        self.admit(parts)
        if state or (state is not None and self.stage.fit is not None):
            self.method = self.method.bind(untuned(subject, state))
        self.method.check_fit(self.stage.fit)
        if self.method.state is None and self.stage.fit is not None:
            self.method, self.fitted = self.fit(subject, parts, work)
        self.handle = self.put(subject, parts, self.acting)
        return self.handle

    def put(self, subject: Subject, parts: adapter.Anatomy, method: TokenMethod) -> VlmHandle:
        """`method` at work."""
        tokens = self.nominal(parts).tokens
        stages_of = partial(self.stages, parts, method)
        if method.evicts():
            return VlmHandle(self.caches(subject, parts, method, stages_of), None, stages_of(tokens), tokens)
        driver, projector = self.drivers(subject, parts, method, stages_of)
        return VlmHandle(driver, projector, stages_of(tokens), tokens, self.fitted)

    def caches(
        self,
        subject: Subject,
        parts: adapter.Anatomy,
        method: TokenMethod,
        stages_of: Callable[[int], Sequence[Stage]],
    ) -> ImageCaches:
        """What runs `method` behind prompts."""
        positions = self.positions(parts, inside=True)
        return ImageCaches(
            subject.model,
            parts.outer,
            method,
            partial(adapter.image_tokens, subject.model),
            stages_of,
            exact=self.stage.keep is not None,
            positions=check_positions(numbering(positions), parts.core),
            check_later=partial(adapter.check_later, subject.model),
        )

    def drivers(
        self,
        subject: Subject,
        parts: adapter.Anatomy,
        method: TokenMethod,
        stages_of: Callable[[int], Sequence[Stage]],
        kind: type[DecoderDriver] = DecoderDriver,
    ) -> tuple[DecoderDriver, Projector]:
        """What runs `method` inside the decoder, and before it."""
        positions = self.positions(parts)
        # Before the first hook is in place.
        check_positions(numbering(positions), parts.core)
        beside.check(method, parts.core)
        projector = Projector(
            subject.model,
            parts,
            method,
            stages_of,
            self.recipe.seed,
            ascending=positions == "gap",
            processor=subject.processor,
            clip=load_clip(name, subject.device) if (name := getattr(self.method, "clip", "")) else None,
        )
        sites = {stage.site for stage in stages_of(self.nominal(parts).tokens)}
        driver = kind(
            subject.model,
            method,
            partial(adapter.image_tokens, subject.model),
            stages_of,
            positions=numbering(positions),
            positions_inside=numbering(self.positions(parts, inside=True)),
            entrance=projector if PROJECTOR in sites else None,
            outer=parts.outer,
            seeds_of=projector.seeds,
            images=projector,
            check_later=partial(adapter.check_later, subject.model),
        )
        return driver, projector

    def fit(
        self, subject: Subject, parts: adapter.Anatomy, work: Path | None
    ) -> tuple[TokenMethod, dict[str, Any]]:
        """The method with what it learned from `--fit`, and the facts of the fit."""
        from tprune.pipelines.fit import Fitting
        from tprune.pipelines.vlm_course import VlmCourse

        course = VlmCourse(self, subject, parts, self.lessons)
        return Fitting(self.method, self.stage.keep, self.recipe.seed, course, work, self.progress).run()

    def stages(self, parts: adapter.Anatomy, method: TokenMethod, tokens: int) -> tuple[Stage, ...]:
        """Where tokens leave a prompt, or an image, with so many image tokens; counts that vary are as learned."""
        learned = method.varies() and method.learns != "no"
        return solve(method, self.shape(parts, tokens), None if learned else self.stage.keep)

    def positions(self, parts: adapter.Anatomy, inside: bool = False) -> str:
        """As asked; else the paper's own, but never renumbered where positions are rows and columns of an image.

        "gap" (grounding-aware token pruning, arXiv 2506.21873) is "original" with the tokens in the order of their
        positions even where a method has its own; a merged token has the place of the token it is built on.

        Args:
            parts: of the model.
            inside: of what leaves inside the decoder, and not at the projector.
        """
        if self.stage.positions is not None:
            return self.stage.positions
        rotary = getattr(parts.core, "rotary_emb", None)
        own = (self.method.positions_inside if inside else None) or self.method.positions
        return "original" if own == "compact" and hasattr(rotary, "mrope_section") else own

    def probe(self, subject: Subject) -> dict[str, Tensor]:
        """Two prompts with a noise image each, and the logits behind them."""
        return question_task.probe(subject, self.recipe.seed)

    def describe_data(self) -> dict[str, Any]:
        """Which questions."""
        return self.task.protocol

    def pictures(self, subject: Subject, handle: Handle, sample: Sample) -> list[Any]:
        """The image with what is left of its tokens after every site, and what is answered with and without them."""
        from tprune.pipelines.vlm_pictures import of_vlm

        return of_vlm(self, subject, handle, sample)

    def bench(self, subject: Subject, rounds: int) -> dict[str, Any]:
        """Whole prompts and their parts, dense and pruned in turn, and the method's selection at the size of LLaVA."""
        if self.stage.fit is None:
            shape = self.nominal(adapter.anatomy(subject.model))
            self.method = for_timing(self.method, shape, self.recipe.seed, subject.device)
        inputs = noise_prompts(subject.model, self.recipe.batch_size, self.recipe.seed)
        found = self.beside_dense(subject, lambda one: prefill(one, inputs), rounds)
        found["times"] |= bench_vlm.parts(lambda one: self.apply(one, None), subject, inputs, rounds)
        found["times"]["select 64 of 576"] = bench_vlm.select_alone(self.acting, subject.device, rounds)
        return found | {"items": self.recipe.batch_size, "unit": "prompts"}


def numbering(positions: str) -> str:
    """How positions are numbered: "gap" is "original" but for the order."""
    return "original" if positions == "gap" else positions


PIPELINE = VlmPipeline
