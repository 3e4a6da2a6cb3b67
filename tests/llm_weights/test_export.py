"""Forms for special kernels: refused where they cannot run, and made only of layers that have them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.decoders import decoder, tokens
from tests.llm_weights.test_command import SMALL, run
from tests.llm_weights.tiny import logits, prune
from tprune.errors import UserError
from tprune.evaluate import perplexity
from tprune.models.semi_structured import convert, fits
from tprune.models.subject import Subject
from tprune.pipelines import export
from tprune.pipelines.base import Workload
from tprune.recipe import ModelSource, Recipe, Stage


def recipe(**changes):
    stage = Stage("llm-weights", "wanda", pattern="2:4")
    return Recipe(ModelSource("one"), (stage,), **{"device": "cuda", "dtype": "bfloat16"} | changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--pattern", "2:4", "--export", "sparse24"],
            "run on a CUDA device, not on cpu; give --device cuda",
        ),
        (["--sparsity", "0.5", "--export", "sparse24"], "give --pattern 2:4"),
        (["--pattern", "1:4", "--export", "sparse24"], "give --pattern 2:4"),
        (["--pattern", "2:4", "--export", "onnx"], "--export onnx: expected sparse24"),
    ],
)
def test_what_cannot_run_here_is_refused_before_anything_is_measured(
    arguments, message, folder, text, monkeypatch
):
    monkeypatch.setattr(perplexity, "token_losses", None)
    with pytest.raises(UserError, match=message):
        run("--method", "wanda", folder, "--data", text, *SMALL, *arguments)


def test_old_devices_and_full_precision_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old one")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UserError, match="an old one has compute capability 7.5"):
        export.check("sparse24", recipe())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(UserError, match="give --dtype bfloat16 or float16"):
        export.check("sparse24", recipe(dtype="float32"))
    export.check("sparse24", recipe())


def test_only_layers_with_two_of_four_inputs_zero_and_a_size_that_divides_fit():
    weight = torch.randn(32, 64)
    assert not fits(weight)
    weight[:, 0::4] = weight[:, 3::4] = 0
    assert fits(weight)
    assert not fits(weight[:24])
    assert not fits(weight[:, :32])
    assert not fits(weight.t().contiguous())


def test_the_form_is_measured_beside_the_same_weights_and_the_model_keeps_its_own(text, monkeypatch):
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", torch.clone)
    model = decoder(hidden_size=64, intermediate_size=96)
    prune(model, "wanda", text, pattern="2:4")
    nn.init.normal_(model.model.layers[0].mlp.up_proj.weight)
    own = dict(model.named_parameters())
    ids = tokens(1, 8)
    driver = SimpleNamespace(workload=lambda one: Workload(lambda: logits(one.model, ids), 8, "tokens"))
    told = export.export(driver, Subject(model, None, None))
    # Of seven layers in three blocks, down_proj has 96 inputs, and one is no longer pruned.
    assert (told["converted"], told["left"]) == (3 * 6 - 1, 4)
    assert told["speed_up"] == told["dense_ms"] / told["sparse_ms"]
    assert all(parameter is own[name] for name, parameter in model.named_parameters())
    assert convert(decoder()) == {"converted": 0, "left": 21}
