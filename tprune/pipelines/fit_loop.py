"""The one training loop of everything that is fitted: batches, losses, steps, checkpoints."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from tprune import training
from tprune.methods.fit import Fit, Plan
from tprune.progress import Progress

READERS = max(1, min(8, (os.cpu_count() or 1) - 1))
SMOOTH = 0.9
"""What the loss that is told keeps of itself at every step."""


def stacked(samples: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Tensor]:
    """Images [3, H, W] and what they are, as one batch: [b, 3, H, W] and [b, ...]."""
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.stack([torch.as_tensor(label) for label in labels])


class Batches:
    """What every step sees: a pure function of the seed, so that a run resumes without going through its past.

    Args:
        data: what to draw from, by `sample(place)` and `len()`; every pass over it has its own order.
        prepare: an image as the model wants it, [3, H, W]; None where it is taken as the data gives it.
        size: samples per step, over all processes.
        seed: of the order.
        share: (this process, processes).
        collate: from the samples of a step, (image, label) each, to what the model is given and what it shall say.
    """

    def __init__(
        self,
        data: Any,
        prepare: Callable[[Any], Tensor] | None,
        size: int,
        seed: int,
        share: tuple[int, int] = (0, 1),
        collate: Callable[[Sequence[tuple[Any, Any]]], tuple[Any, Tensor]] = stacked,
    ):
        self.data, self.prepare, self.size, self.seed, self.share = data, prepare, size, seed, share
        self.collate = collate
        self.epoch, self.order = -1, []

    def read(self, steps: Iterable[int]) -> Iterator[tuple[Any, Tensor]]:
        """Inputs and labels of every step, read during the step before: images [b, 3, H, W] and classes [b]."""
        with ThreadPoolExecutor(READERS) as pool:
            waiting: deque[list[Future]] = deque()
            for step in steps:
                waiting.append([pool.submit(self._one, place) for place in self.places(step)])
                if len(waiting) > 1:
                    yield self._collected(waiting.popleft())
            while waiting:
                yield self._collected(waiting.popleft())

    def places(self, step: int) -> list[int]:
        """Where this process's images of a step are in the data."""
        first, (rank, processes) = step * self.size, self.share
        return [self._place(draw) for draw in range(first + rank, first + self.size, processes)]

    def _place(self, draw: int) -> int:
        epoch, place = divmod(draw, len(self.data))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self.data), generator=generator).tolist()
        return self.order[place]

    def _one(self, place: int) -> tuple[Any, Any]:
        image, label = self.data.sample(place)
        return image if self.prepare is None else self.prepare(image), label

    def _collected(self, read: list[Future]) -> tuple[Any, Tensor]:
        return self.collate([one.result() for one in read])


class Learner(nn.Module):
    """A model with what is fitted in it, as one module: inputs and labels in, losses out.

    Args:
        model: the model.
        fit: what is fitted.
        driver: puts it into the model.
        outputs: the model's outputs for inputs, [n, C].
        labelled: whether the labels of the data are what it learns from; if not, it learns from its own dense outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        fit: Fit,
        driver: Any,
        outputs: Callable[[Any], Tensor],
        labelled: bool,
    ):
        super().__init__()
        self.model, self.fit = model, fit
        self.driver, self.outputs, self.labelled = driver, outputs, labelled

    def forward(self, inputs: Any, labels: Tensor) -> dict[str, Tensor]:
        """The losses by name."""

        def dense() -> Tensor:
            with self.driver.away():
                return self.outputs(inputs)

        if not self.labelled:
            with torch.no_grad():
                labels = dense().softmax(-1)
        labels = labels.to(next(self.model.parameters()).device)
        if self.fit.apart:
            return self.fit.losses(None, labels, {"inputs": inputs}, dense)
        outputs = self.outputs(inputs)
        memory = self.driver.memory
        memory |= {"inputs": inputs, "again": self.outputs}
        return self.fit.losses(outputs, labels, memory, dense)


class Loop:
    """The steps of a plan, from the checkpoint on where there is one.

    Args:
        learner: what is trained.
        plan: how long and how fast.
        samples: how many the data has.
        file: of the checkpoint, or None.
        progress: where to say what goes on.
        unit: what the samples are.

    Attributes:
        steps: how many there are.
        seconds: spent on them, over all interruptions.
        losses: by name, the first and a running mean of the last.
    """

    def __init__(
        self,
        learner: nn.Module,
        plan: Plan,
        samples: int,
        file: Path | None,
        progress: Progress,
        unit: str = "images",
    ):
        self.learner, self.plan, self.file, self.progress = learner, plan, file, progress
        self.unit = unit
        self.steps = max(1, round(plan.epochs * samples / plan.batch))
        self.named = {name: p for name, p in learner.named_parameters() if p.requires_grad}
        common = {"lr": plan.lr, "weight_decay": plan.weight_decay}
        groups = [common | group for group in learner.fit.groups(learner.model)]
        self.peaks = [group["lr"] for group in groups]
        sgd = plan.momentum is not None
        self.optimizer = torch.optim.SGD(groups, momentum=plan.momentum) if sgd else torch.optim.AdamW(groups)
        self._go_on(*({}, {}) if file is None else training.load(file, self.named))

    def _go_on(self, told: dict[str, str], moments: dict[str, Tensor]) -> None:
        """From a checkpoint's facts and moments; from the start without."""
        training.restore_moments(self.optimizer, self.named, moments, int(told.get("step", 0)))
        self.begin, self.seconds = int(told.get("step", 0)), float(told.get("seconds", 0))
        self.losses: dict[str, tuple] = json.loads(told.get("losses", "{}"))

    def _agree(self) -> None:
        """All processes go on from the first one's checkpoint; its weights they have already."""
        facts, moments = self._facts(self.begin, self.seconds), training.moments(self.optimizer, self.named)
        self._go_on(*broadcast_object_list([facts, moments]))

    def run(self, batches: Batches, accelerator: Accelerator, seed: int) -> None:
        """All steps that are left."""
        learner, optimizer = accelerator.prepare(self.learner, self.optimizer)
        if accelerator.num_processes > 1:
            self._agree()
        device, began, saved = (
            next(self.learner.model.parameters()).device,
            time.monotonic(),
            time.monotonic(),
        )
        left = range(self.begin, self.steps)
        if self.begin:
            self.learner.fit.settle(self.begin / self.steps)
        self.progress.say(f"fitting: {len(left)} steps of {self.plan.batch} {self.unit}")
        pairs = zip(left, batches.read(left), strict=True)
        for step, (inputs, labels) in self.progress.track(pairs, "fitting", len(left)):
            warmup = round(self.plan.warmup * self.steps)
            falling = training.warm_linear if self.plan.linear else training.warm_cosine
            share = falling(step, self.steps, warmup, self.plan.floor)
            for group, peak in zip(optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * share
            draw = (seed * 1_000_003 + step) * accelerator.num_processes + accelerator.process_index
            self.learner.fit.generator = torch.Generator(device).manual_seed(draw)
            optimizer.zero_grad()
            found = self._backward(learner, accelerator, inputs, labels)
            if self.plan.clip is not None:
                accelerator.clip_grad_norm_(self.named.values(), self.plan.clip)
            optimizer.step()
            done = step + 1
            self.learner.fit.settle(done / self.steps)
            self._note(found)
            if done % max(1, self.steps // 10) == 0:
                self.progress.say(f"step {done} of {self.steps}: {self._told()}")
            now = time.monotonic()
            due = done == self.steps or now - saved > training.SAVE_EVERY_SECONDS
            if due and self.file is not None and accelerator.is_main_process:
                self._save(done, self.seconds + now - began)
                saved = now
        self.seconds += time.monotonic() - began
        accelerator.free_memory()

    def _backward(
        self, learner: nn.Module, accelerator: Accelerator, inputs: Any, labels: Any
    ) -> dict[str, Tensor]:
        """Gradients of a step, and its losses by name; in parts where the plan says so."""
        if self.plan.at_once is None:
            found = learner(inputs, labels)
            accelerator.backward(sum(found.values()))
            return found
        told: dict[str, Tensor] = {}
        for part, said in zip(inputs.split(self.plan.at_once), labels.split(self.plan.at_once), strict=True):
            share = len(part) / len(inputs)
            found = {name: value * share for name, value in learner(part, said).items()}
            accelerator.backward(sum(found.values()))
            told = {name: told.get(name, 0.0) + value.detach() for name, value in found.items()}
        return told

    def _note(self, found: dict[str, Tensor]) -> None:
        for name, value in found.items():
            value = value.detach()
            first, last = self.losses.get(name, (value, value))
            self.losses[name] = first, SMOOTH * last + (1 - SMOOTH) * value

    def _told(self) -> str:
        return ", ".join(f"{name} {float(last):.4f}" for name, (_, last) in self.losses.items())

    def figures(self) -> dict[str, Any]:
        """Steps, and the losses at both ends, as numbers."""
        ends = {name: [float(first), float(last)] for name, (first, last) in self.losses.items()}
        return {"steps": self.steps, "batch": self.plan.batch, "losses": ends}

    def _facts(self, step: int, seconds: float) -> dict[str, str]:
        return {"step": str(step), "seconds": str(seconds), "losses": json.dumps(self.figures()["losses"])}

    def _save(self, step: int, seconds: float) -> None:
        kept = training.moments(self.optimizer, self.named)
        training.save(self.file, self.named, kept, self._facts(step, seconds))
