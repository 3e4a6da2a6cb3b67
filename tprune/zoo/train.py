"""Training of the built-in models: stages of AdamW on scenes made as they are needed, over one process per core.

On small machines two single-threaded processes that average their gradients are nearly twice as fast as one process
with two threads, so a run is a set of equal *workers*. Scene indices, initial weights and the order of everything
follow from the seed: the same seed, workers and versions give the same weights on the same machine.
"""

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from tprune import training

_CHECKPOINT = "state.safetensors"
_LOG_EVERY_STEPS = 20


@dataclass(frozen=True)
class Stage:
    """One leg of a training run: `batch` scenes a step over all workers, linear warm-up, cosine decay from `lr`."""

    name: str
    steps: int
    batch: int
    lr: float
    warmup: int = 100


class Learner(nn.Module):
    """A model in training, with whatever heads its auxiliary losses need."""

    stages: ClassVar[tuple[Stage, ...]]
    unit: ClassVar[str] = "scenes"

    def loss(self, stage: str, indices: Sequence[int], seed: int) -> Tensor:
        """Mean loss over the training samples with these indices, a scalar."""
        raise NotImplementedError

    def accuracy(self, n: int) -> dict:
        """Facts measured on the first `n` evaluation samples; the key `accuracy` is the overall figure."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write the bare model, without auxiliary heads, as the library it comes from expects it."""
        raise NotImplementedError


def new_learner(name: str, seed: int) -> Learner:
    """The untrained learner of a built-in model, initialised from `seed` without touching the global random state."""
    if name == "digits-vit":
        from tprune.zoo.digits_vit import DigitsVit as Kind
    elif name == "digits-llava":
        from tprune.zoo.digits_llava import DigitsLlava as Kind
    elif name == "minilm-topics":
        from tprune.zoo.minilm_topics import MinilmTopics as Kind
    else:
        raise ValueError(f"no trainer for {name!r}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Kind()


@contextmanager
def only_blocks(model: nn.Module, attribute: str, chosen: Iterable[int]) -> Iterator[None]:
    """Run a model with only some entries of its list of blocks; outside the context it is whole again."""
    blocks = getattr(model, attribute)
    setattr(model, attribute, blocks[:0].extend(blocks[i] for i in chosen))
    try:
        yield
    finally:
        setattr(model, attribute, blocks)


def scaled(stages: Sequence[Stage], total: int | None) -> tuple[Stage, ...]:
    """The stages stretched or shrunk in proportion so that their steps sum to about `total`, at least one each."""
    if total is None:
        return tuple(stages)
    ratio = total / sum(stage.steps for stage in stages)
    return tuple(replace(stage, steps=max(1, round(stage.steps * ratio))) for stage in stages)


def train(name: str, out: Path, steps: int | None, seed: int, workers: int, evaluate_on: int = 2000) -> dict:
    """Train a built-in model into the folder `out` and return its facts; an interrupted run resumes where it was.

    Progress lives in the folder `<out>.training`, which is removed once `out` has been written whole.
    """
    scratch = out.with_name(out.name + ".training")
    scratch.mkdir(parents=True, exist_ok=True)
    settings = (name, str(scratch), steps, seed, workers)
    if workers == 1:
        _work(0, settings, "")
    else:
        with tempfile.TemporaryDirectory() as meeting:
            torch.multiprocessing.spawn(_work, (settings, f"file://{meeting}/workers"), nprocs=workers)
    learner = new_learner(name, seed)
    training.load(scratch / _CHECKPOINT, dict(learner.named_parameters()))
    facts = ship(name, learner, out, seed, evaluate_on)
    shutil.rmtree(scratch)
    return facts


def ship(name: str, learner: Learner, out: Path, seed: int, evaluate_on: int) -> dict:
    """Measure a trained learner and write the model with its `zoo.json`; `out` is replaced as a whole."""
    facts = {"name": name, "seed": seed, learner.unit: evaluate_on, **learner.eval().accuracy(evaluate_on)}
    beside = Path(tempfile.mkdtemp(prefix=out.name + ".", dir=out.parent))
    learner.save(beside)
    (beside / "zoo.json").write_text(json.dumps(facts, indent=2) + "\n")
    beside.chmod(0o755)
    (beside / "model.safetensors").chmod(0o644)
    if out.exists():
        shutil.rmtree(out)
    os.rename(beside, out)
    return facts


def _work(rank: int, settings: tuple, meeting: str) -> None:
    """One worker's whole run; worker 0 also keeps the log and the checkpoint."""
    name, scratch, steps, seed, workers = settings
    scratch = Path(scratch)
    torch.set_num_threads(1)
    if workers > 1:
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=workers)
    learner = new_learner(name, seed)
    stages = scaled(learner.stages, steps)
    place, moments = training.load(scratch / _CHECKPOINT, dict(learner.named_parameters()))
    at_stage, at_step = int(place.get("stage", 0)), int(place.get("step", 0))
    seen = 0
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        disable=rank > 0,
    ) as progress:
        for number, stage in enumerate(stages):
            if number >= at_stage:
                bar = progress.add_task(f"{name}: {stage.name}", total=stage.steps, loss=math.nan)
                report = _Reporter(rank, scratch, number, stage, progress, bar)
                begin, resumed = (at_step, moments) if number == at_stage else (0, {})
                _run_stage(learner, stage, begin, resumed, seen, seed, (rank, workers), report)
            seen += stage.steps * stage.batch
    if workers > 1:
        dist.destroy_process_group()


def _run_stage(learner, stage, begin, moments, seen, seed, place, report) -> None:
    """Steps `begin` to the end of one stage; `place` is (this worker, workers)."""
    rank, workers = place
    learner.train()
    named = {n: p for n, p in learner.named_parameters() if p.requires_grad}
    decayed = [p for p in named.values() if p.ndim > 1]
    plain = [p for p in named.values() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.98))
    training.restore_moments(optimizer, named, moments, begin)
    warmup = min(stage.warmup, max(1, stage.steps // 10))
    for step in range(begin, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * training.warm_cosine(step, stage.steps, warmup, 0.01)
        first = seen + step * stage.batch
        loss = learner.loss(stage.name, range(first + rank, first + stage.batch, workers), seed)
        optimizer.zero_grad()
        loss.backward()
        _average_gradients(named.values(), workers)
        nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        report(step + 1, loss.item(), learner, optimizer, named)


def _average_gradients(parameters, workers: int) -> None:
    if workers == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= workers
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@dataclass
class _Reporter:
    """Worker 0's log line every few steps and checkpoint every few minutes; silent in the other workers."""

    rank: int
    scratch: Path
    number: int
    stage: Stage
    progress: Progress
    bar: int
    smooth: float = math.nan
    saved: float = 0.0

    def __post_init__(self):
        self.saved = time.monotonic()

    def __call__(self, step: int, loss: float, learner: Learner, optimizer, named: dict) -> None:
        if self.rank > 0:
            return
        self.smooth = loss if math.isnan(self.smooth) else 0.95 * self.smooth + 0.05 * loss
        self.progress.update(self.bar, completed=step, loss=self.smooth)
        if step % _LOG_EVERY_STEPS == 0:
            line = {
                "stage": self.stage.name,
                "step": step,
                "loss": round(self.smooth, 4),
                "time": int(time.time()),
            }
            with open(self.scratch / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
        if step == self.stage.steps or time.monotonic() - self.saved > training.SAVE_EVERY_SECONDS:
            done = step == self.stage.steps
            place = {"stage": str(self.number + done), "step": str(0 if done else step)}
            moments = {} if done else training.moments(optimizer, named)
            training.save(self.scratch / _CHECKPOINT, dict(learner.named_parameters()), moments, place)
            self.saved = time.monotonic()
