"""How a pruned model is trained to recover: `--recover NAME[:SETTING=VALUE,…]`, beside any method that prunes weights.

What was pruned stays pruned. The papers agree on little more than low ranks; the defaults are LLM-Pruner's (rank 8, a
learning rate of 1e-4, α twice the rank), but for its 2 epochs over 50,000 instructions at 64 to a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tprune.errors import UserError
from tprune.methods.base import Method, Paper, param
from tprune.methods.choice import chosen


@dataclass(frozen=True)
class Recovery(Method):
    """Next-token training of a pruned model on text, with AdamW."""

    needs: ClassVar[str | None] = None
    """A package that it needs beside those that are always there."""

    epochs: float = param(1.0, "passes over the text, fractions allowed", low=0)
    batch: int = param(8, "sequences per step, over all processes", low=1)
    lr: float = param(1e-4, "peak learning rate; a cosine takes it to 0", low=0)
    warmup: float = param(0.05, "fraction of the steps at which the learning rate still rises", low=0, high=1)
    weight_decay: float = param(0.0, "of what is trained", low=0)


@dataclass(frozen=True)
class Lora(Recovery):
    """A low-rank change of every linear layer of the blocks, trained under the mask and merged at the end."""

    id = "lora"
    needs = "peft"
    paper = Paper(
        title="LoRA: Low-Rank Adaptation of Large Language Models",
        venue="ICLR",
        year=2022,
        arxiv="2106.09685",
        notes="where weights were masked, the change is masked too, in training as at the end",
    )

    rank: int = param(8, "of the change of a layer", low=1)
    alpha: float = param(16.0, "the change counts alpha / rank times", low=0)


@dataclass(frozen=True)
class Full(Recovery):
    """All parameters are trained."""

    id = "full"
    paper = Paper(title="fine-tuning of all parameters (baseline)", venue="-", year=2024)

    lr: float = param(1e-5, "peak learning rate; a cosine takes it to 0", low=0)


RECOVERIES: dict[str, type[Recovery]] = {kind.id: kind for kind in (Lora, Full)}


def parse(text: str) -> Recovery:
    """The recovery that `--recover` names, "lora" or "lora:rank=16,epochs=2".

    Raises:
        UserError: an unknown name or setting.
    """
    found = chosen("--recover", text, RECOVERIES)
    if found.epochs == 0:
        raise UserError(f"--recover {text}: epochs=0 trains nothing; leave --recover out")
    return found
