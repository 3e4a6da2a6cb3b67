"""What `tprune bench vlm` times: whole prompts, and their parts apart, dense and pruned in turn."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tprune.evaluate.cost import synchronise, timed
from tprune.methods.tokens import TokenMethod
from tprune.models.subject import Subject, twin
from tprune.models.vlm import anatomy
from tprune.pipelines.base import Handle
from tprune.pipelines.kernels import selection

STEPS = 3
"""How many tokens are decoded behind every prompt."""


class Watch:
    """Seconds spent in some functions since `clear`; what runs inside another one counts there only.

    Args:
        device: waited for before the clock is read.
        parts: of every part its name, and the owner and the attribute of the function, called as `owner.attribute`.
    """

    def __init__(self, device: torch.device | str, parts: list[tuple[str, Any, str]]):
        self.device, self.seconds, self.within = device, defaultdict(float), [0.0]
        self.before = [(owner, attribute, vars(owner).get(attribute)) for _, owner, attribute in parts]
        for name, owner, attribute in parts:
            setattr(owner, attribute, partial(self._run, name, getattr(owner, attribute)))

    def remove(self) -> None:
        """Put the functions back as they were."""
        for owner, attribute, own in self.before:
            delattr(owner, attribute)
            if own is not None:
                setattr(owner, attribute, own)

    def clear(self) -> None:
        """Start again at zero."""
        self.seconds.clear()

    def _run(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        synchronise(self.device)
        start = time.perf_counter()
        self.within.append(0.0)
        try:
            return function(*args, **kwargs)
        finally:
            synchronise(self.device)
            took = time.perf_counter() - start
            self.seconds[name] += took - self.within.pop()
            self.within[-1] += took


def parts(
    apply: Callable[[Subject], Handle], subject: Subject, inputs: dict[str, Any], rounds: int
) -> dict[str, list[float]]:
    """Seconds of the encoder (tower and projector), the prefill (decoder), a decode step, and the method's scoring.

    Scoring is everything between a prompt's image tokens and their reduction: signals, choice and gathering. What a
    prompt costs beside its parts (merging the embeddings, the head) is in its total only.
    """
    dense = replace(subject, model=twin(subject.model))
    handle = apply(subject)
    scoring = [("scoring", *part) for part in handle.scoring()]
    runs = {"dense": (dense, _watch(dense, [])), "pruned": (subject, _watch(subject, scoring))}
    times: dict[str, list[float]] = defaultdict(list)
    with torch.no_grad():
        for turn in range(1 + rounds):
            for name, (one, watch) in runs.items():
                watch.clear()
                output = one.model(**inputs, use_cache=True, logits_to_keep=1)
                spent = dict(watch.seconds)
                steps = [timed(partial(_step, one, output), subject.device) for _ in range(STEPS)]
                if turn == 0:
                    continue
                for part in ("encoder", "prefill"):
                    times[f"{part}_{name}"].append(spent[part])
                if "scoring" in spent:
                    times["scoring"].append(spent["scoring"])
                times[f"decode_{name}"] += steps
    for _, watch in runs.values():
        watch.remove()
    handle.remove()
    return {name: times[name] for name in sorted(times, key=_place)}


def select_alone(method: TokenMethod, device: torch.device | str, rounds: int) -> list[float]:
    """Seconds of the method's selection of 64 among 576 tokens of width 4,096."""
    select = selection(method, device)
    with torch.no_grad():
        select()
        return [timed(select, device) for _ in range(max(rounds, 15))]


def _watch(subject: Subject, more: list[tuple[str, Any, str]]) -> Watch:
    """A watch on the encoder and the decoder of a model, and on `more`."""
    found = anatomy(subject.model)
    parts = [("encoder", found.outer, "get_image_features"), ("prefill", found.core, "forward"), *more]
    return Watch(subject.device, parts)


def _step(subject: Subject, output: Any) -> Tensor:
    """One token behind a prompt; the cache grows by it."""
    token = output.logits[:, -1].argmax(-1, keepdim=True)
    return subject.model(input_ids=token, past_key_values=output.past_key_values, use_cache=True).logits


def _place(name: str) -> int:
    """Parts in the order they run."""
    return ["encoder", "scoring", "prefill", "decode"].index(name.split("_")[0])
