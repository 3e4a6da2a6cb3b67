"""Structured methods against the authors' own code, through the whole pipeline, on tiny random decoders."""

import pytest
import torch

from tests.decoders import decoder
from tests.golden_values import golden
from tests.llm_weights.test_contract import _driver as driver_of
from tests.llm_weights.tiny import prune
from tprune.core.allocate import widths_by_importance
from tprune.methods import registry
from tprune.methods.weight_view import MemberView, UnitView
from tprune.methods.weights import WeightBudget
from tprune.models.blocks import find_decoder
from tprune.pipelines import prune_weights
from tprune.pipelines.journal import Journal
from tprune.pipelines.removal import Removal


def edits(method, model, ids, sparsity, **settings):
    """What a method keeps of a model, by the names of the record."""
    driver = driver_of(method)
    driver.method = registry.build(method, "llm-weights", settings)
    return prune_weights.prune(
        driver, find_decoder(model), WeightBudget(sparsity), ids, Journal(None, "test")
    ).edits


@pytest.mark.parametrize("method", ["wanda-sp", "mag-sp"])
@pytest.mark.parametrize("case", ["p25", "p50"])
def test_flap_s_baselines_keep_the_authors_units(method, case):
    tensors, told = golden("llm-weights", method)
    model = decoder(**told["settings"]["model"])
    found = edits(method, model, tensors["tokens"], told["settings"]["cases"][case])
    for layer in range(3):
        for kind in ("heads", "channels"):
            assert torch.equal(found[f"keep/{layer}.{kind}"], tensors[f"{case}.{layer}.{kind}"])


@pytest.mark.parametrize("case", ["first", "second", "mix", "vectorize", "prod"])
def test_llm_pruner_keeps_the_authors_units_at_the_authors_scores(case, monkeypatch):
    tensors, told = golden("llm-weights", "llm-pruner")
    setting = told["settings"]["cases"][case]
    start, end = setting["start"], setting["end"]
    kind, scores = registry.load("llm-pruner", "llm-weights"), []
    score = kind.score
    monkeypatch.setattr(kind, "score", lambda self, unit: scores.append(score(self, unit)) or scores[-1])
    found = edits(
        "llm-pruner",
        decoder(num_key_value_heads=4, num_hidden_layers=4),
        tensors["tokens"],
        setting["ch_sparsity"] * (end - start) / 4,
        taylor=setting["taylor"].removeprefix("param_"),
        reduction=setting["group_reduction"],
        first=8 * start,
        last=8 * (4 - end),
    )
    for layer in range(4):
        for kind in ("heads", "channels"):
            kept = found.get(f"keep/{layer}.{kind}", torch.arange(4 if kind == "heads" else 48))
            assert torch.equal(kept, tensors[f"{case}.{layer}.{kind}"])
    places = [f"{case}.{layer}.{kind}.score" for layer in range(start, end) for kind in ("heads", "channels")]
    for place, found in zip(places, scores, strict=True):
        assert torch.allclose(found, tensors[place], rtol=1e-4)


def test_llm_pruner_adds_up_the_query_heads_of_a_key_value_group():
    weight = torch.randn(3, 2 * 4, 5)  # 3 groups of 2 heads of width 4
    narrow = torch.randn(3, 4, 5)
    members = [MemberView(weight, torch.ones_like(weight)), MemberView(narrow, torch.ones_like(narrow))]
    unit = UnitView("heads", torch.empty(5, 24), 8, 2, 1, members=lambda: iter(members))
    method = registry.build("llm-pruner", "llm-weights", {"reduction": "max"})
    per_head = weight.abs().sum(2).view(3, 2, 4)
    expected = torch.maximum(per_head[:, 0] + per_head[:, 1], narrow.abs().sum(2)).sum(1)
    assert torch.allclose(method.score(unit), expected)


def answers(monkeypatch):
    """A list of what a search is answered, which fills while it runs."""
    asked, measure = [], Removal._measure

    def measured(self, made, candidates):
        asked.append(measure(self, made, candidates))
        return asked[-1]

    monkeypatch.setattr(Removal, "_measure", measured)
    return asked


@pytest.mark.parametrize("case", ["mix", "mha", "mlp"])
def test_blockpruner_removes_the_authors_halves_at_the_authors_perplexities(case, monkeypatch):
    tensors, told = golden("llm-weights", "blockpruner")
    order = [
        ({"mha": "attention", "mlp": "mlp"}[kind], layer) for kind, layer in told["settings"]["cases"][case]
    ]
    model = decoder(num_hidden_layers=5)
    sizes = {"attention": 3072, "mlp": 4608}
    asked = answers(monkeypatch)
    sparsity = sum(sizes[kind] for kind, _ in order) / 38400
    halves = {"mix": "both", "mha": "attention", "mlp": "mlp"}[case]
    found = edits("blockpruner", model, tensors["tokens"], sparsity, halves=halves)
    for kind in sizes:
        gone = sorted(layer for one, layer in order if one == kind)
        assert found.get(f"without.{kind}", torch.tensor([])).tolist() == gone
    assert torch.allclose(torch.cat(asked).exp(), tensors[f"{case}.ppl"], rtol=1e-4)
    left = find_decoder(model).blocks
    assert len(left) == 5 - sum((("attention", i) in order) and (("mlp", i) in order) for i in range(5))


def test_blockpruner_at_a_lower_budget_removes_the_first_of_what_it_removes_at_a_higher(text):
    def gone(sparsity):
        edited = prune(decoder(), "blockpruner", text, sparsity=sparsity).tensors(by_reference=True)
        return {
            (kind, at)
            for kind in ("attention", "mlp")
            for at in edited.get(f"without.{kind}", torch.tensor([])).tolist()
        }

    few, more, most = gone(0.15), gone(0.35), gone(0.6)
    assert few < more < most


CFSP = ("default", "sharp", "half", "free", "cosine", "constant", "wanda", "shrunk")


@pytest.mark.parametrize("case", CFSP)
def test_cfsp_keeps_the_authors_channels_in_every_block(case):
    tensors, told = golden("llm-weights", "cfsp")
    setting, ids = told["settings"]["cases"][case], tensors["tokens"]
    model = decoder(**told["settings"]["model"])
    mlp, attention = 3 * 32 * 1024, 3072
    found = edits(
        "cfsp",
        model,
        ids,
        setting["pruning_ratio"] * mlp / (mlp + attention),
        importance=setting["global_metrics"],
        metric={"wanda_base": "wanda"}.get(setting["local_metrics"], "activation"),
        sharpness=setting["a"] * ids.numel() / (128 * 1024),
        multiple=128 if setting["cuda_friendly"] else 1,
    )
    for layer in range(5):
        assert torch.equal(found[f"keep/{layer}.channels"], tensors[f"{case}.{layer}"])


def test_widths_by_importance_have_the_asked_mean_and_none_is_whole():
    for sharpness in (0.0, 1.0, 50.0, 1000.0):
        shares = widths_by_importance([0.1, 0.4, 0.2, 0.9], 0.2, sharpness)
        assert sum(shares) / 4 == pytest.approx(0.8)
        assert max(shares) < 1
        assert (shares[3] > shares[1] > shares[2] > shares[0]) == (0 < sharpness < 1000)
    assert widths_by_importance([0.3, 0.3], 0.0, 5.0) == [1.0, 1.0]


def test_mini_gpts_removes_the_channels_that_the_authors_zero():
    tensors, told = golden("llm-weights", "mini-gpts")
    model = decoder("opt")
    weights = sum(p.numel() for p in model.model.decoder.layers.parameters() if p.dim() > 1)
    found = edits("mini-gpts", model, tensors["tokens"], told["settings"]["gone"] * 2 * 32 / weights)
    for layer in range(3):
        assert torch.equal(found[f"keep/{layer}.channels"], tensors[f"{layer}.channels"])


@pytest.mark.parametrize("case", ["mha", "gqa"])
def test_multipruner_finds_the_authors_halves_and_widths_at_the_authors_perplexities(case, monkeypatch):
    tensors, told = golden("llm-weights", "multipruner")
    setting = told["settings"]["cases"][case]
    model = decoder(**setting["model"])
    group = setting["model"]["num_key_value_heads"]
    weights = sum(p.numel() for p in model.model.layers.parameters() if p.dim() > 1)
    asked = answers(monkeypatch)
    found = edits(
        "multipruner",
        model,
        tensors["tokens"],
        setting["target_ratio"] / 100 * setting["total"] / weights,
        distribution=[float(share) for share in setting["distribution"].split(":")],
        channels=setting["mlp"],
        groups=setting["attention"] * group // 32,
    )
    theirs = setting["found"]
    for kind, name in (("attention", "attn"), ("mlp", "mlp")):
        assert found.get(f"without.{kind}", torch.tensor([])).tolist() == sorted(theirs[f"pruned_{name}_idx"])
    for layer in range(4):
        for kind, name, size, whole in (("heads", "attn", 32 // group, group), ("channels", "mlp", 1, 48)):
            width = len(found.get(f"keep/{layer}.{kind}", torch.arange(whole)))
            assert width * size == theirs[f"pruned_{name}_width"][str(layer)]
    assert torch.allclose(torch.cat(asked).exp(), tensors[f"{case}.ppl"], rtol=1e-4)


def test_blocks_of_different_widths_lose_the_same_share(text):
    model = decoder(num_key_value_heads=4)
    prune(model, "flap", text, sparsity=0.3, compensate=False)
    before = [block.mlp.down_proj.in_features for block in model.model.layers]
    assert len(set(before)) > 1
    assert abs(prune(model, "mag-sp", text, sparsity=0.4).achieved().value - 0.4) < 0.04
    after = [block.mlp.down_proj.in_features for block in model.model.layers]
    shares = [left / count for left, count in zip(after, before, strict=True)]
    assert max(shares) - min(shares) < 2 / min(before)
