"""No method computes a full attention map, but those whose paper says that it must."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tprune
from tests.vlm.tiny import IMAGE, TEXT, TOWER, start
from tprune.core import attending
from tprune.methods import registry
from tprune.models.prompts import noise_prompts

TILE, MANY = 16, 64
"""Query rows at a time where columns are summed, and what is more than those and than a question has."""
MUST = {"aim": "page rank walks over the whole map of the layers in which image tokens leave"}


class Maps(TorchDispatchMode):
    """Shapes [..., R, C] of softmaxes of at least two heads or samples with many rows and columns."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple | list) and out else out
        if "softmax" in func.name() and isinstance(first, Tensor) and first.dim() > 2:
            *lead, rows, columns = first.shape
            if torch.Size(lead).numel() > 1 and min(rows, columns) >= MANY:
                self.found.append((func.name(), tuple(first.shape)))
        return out


@pytest.fixture(scope="module")
def model():
    """A LLaVA with 256 image tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**TOWER | {"image_size": 128}),
            text_config=LlamaConfig(**TEXT),
            image_token_id=IMAGE,
            image_seq_length=256,
        )
        return LlavaForConditionalGeneration(config).eval().requires_grad_(False)


@pytest.mark.parametrize("method", [fact.id for fact in registry.facts("vlm")])
def test_only_methods_that_must_compute_a_full_attention_map(method, model, monkeypatch):
    sums = partial(attending.attention_column_sums, tile=TILE)
    monkeypatch.setattr(attending, "attention_column_sums", sums)
    inputs = noise_prompts(model, 1, 0)
    with (
        torch.no_grad(),
        tprune.prune(model, f"vlm/{method}", **start(method, model), keep=0.8),
        Maps() as maps,
    ):
        model(**inputs, use_cache=True)
    assert bool(maps.found) == (method in MUST), maps.found
