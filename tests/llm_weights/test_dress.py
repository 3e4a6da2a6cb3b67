"""DReSS: what will go is penalised before it goes."""

from dataclasses import replace

import pytest
import torch

from tests.decoders import decoder
from tests.llm_weights.test_artifacts import QUIET, recipe
from tests.llm_weights.tiny import prune
from tprune.core.weights import StructureEdit
from tprune.errors import UserError
from tprune.models.blocks import find_decoder
from tprune.pipelines import prune_weights
from tprune.pipelines.regularise import leaving_norms, regularise
from tprune.pipelines.run import execute


def norms(monkeypatch, text, **settings):
    """The norms of the units that go, before and after the training, and those of a matrix that stays, row by row."""
    seen = []

    def measured(driver, found, tokens, journal, edits):
        for train in (lambda: regularise(driver, found, tokens, journal, edits), lambda: None):
            kept = found.blocks[0].mlp.gate_proj.weight[edits[0].keep["channels"]].norm(dim=1)
            seen.append((leaving_norms(found, edits).detach(), kept.detach()))
            train()

    monkeypatch.setattr(prune_weights, "regularise", measured)
    prune(decoder(), "dress", text, sparsity=0.4, **settings)
    return seen


def test_the_penalty_shrinks_all_that_will_go_and_hardly_what_stays(text, monkeypatch):
    (before, kept_before), (after, kept_after) = norms(monkeypatch, text, penalty=0.1, lr=0.01, epochs=20.0)
    assert (after < before).all()
    leaves, stays = (after / before).mean(), (kept_after / kept_before).mean()
    assert leaves < 0.95 < stays
    (before, _), (after, _) = norms(monkeypatch, text, penalty=0.0, lr=0.01, epochs=20.0)
    assert (after / before).mean() > leaves


def test_the_norm_of_a_unit_is_over_all_its_weights():
    model = decoder()
    mlp, attention = model.model.layers[1].mlp, model.model.layers[1].self_attn
    channels = StructureEdit(1, keep={"channels": torch.arange(1, 48)})
    parts = mlp.gate_proj.weight[0], mlp.up_proj.weight[0], mlp.down_proj.weight[:, 0]
    assert torch.allclose(leaving_norms(find_decoder(model), [channels]), torch.cat(parts).norm())
    heads = StructureEdit(1, keep={"heads": torch.tensor([1])})
    parts = (
        attention.q_proj.weight[:16],
        attention.k_proj.weight[:8],
        attention.v_proj.weight[:8],
        attention.o_proj.weight[:, :16],
    )
    expected = torch.cat([part.flatten() for part in parts]).norm()
    assert torch.allclose(leaving_norms(find_decoder(model), [heads]), expected)


def test_low_precision_is_refused_before_anything_is_loaded(folder, text, tmp_path):
    asked = replace(recipe(folder, text, "dress"), dtype="bfloat16")
    with pytest.raises(UserError, match="dress trains the weights, .* give --dtype float32"):
        execute(asked, QUIET, out=str(tmp_path / "out"))


@pytest.mark.parametrize("select", ["wanda", "magnitude", "random"])
def test_without_epochs_dress_is_the_choice_alone(text, select):
    model, dense = decoder(), decoder()
    keep = prune(model, "dress", text, sparsity=0.4, epochs=0.0, select=select).tensors(by_reference=True)
    for index, layer in enumerate(model.model.layers):
        expected = dense.model.layers[index].mlp.up_proj.weight[keep[f"keep/{index}.channels"]]
        assert torch.equal(layer.mlp.up_proj.weight, expected)
