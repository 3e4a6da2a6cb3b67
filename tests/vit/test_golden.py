"""Against the authors' own code, on the same weights and inputs (see tests/golden/vit/*.json)."""

import json

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import tprune
from tests.golden_values import HERE, golden, under
from tprune.core import match
from tprune.core.reduction import Reduction
from tprune.methods import registry
from tprune.methods.tokens import Shape


def facts(name):
    return json.loads((HERE / "vit" / f"{name}.json").read_text())


TOME = facts("tome")["settings"]["cases"]
TOME_MODEL = [case for case in facts("tome-model")["settings"] if not case.endswith("model")]
EVIT = facts("evit")["settings"]["cases"]


@pytest.mark.parametrize("case", TOME)
def test_tome_merges_as_the_authors_do(case):
    tensors, _ = golden("vit", "tome")
    setting, even = TOME[case], case.startswith("even")
    metric, x = (tensors[name + ("_even" if even else "")] for name in ("metric", "x"))
    prefix = setting["class_token"] + setting.get("distill_token", False)
    count = min(setting["r"], (x.shape[1] - prefix) // 2)
    index, source, into = match.bipartite_merge(metric, count, prefix)
    size = tensors["size"][..., 0] if case.endswith("sized") else None
    reduction = Reduction.average(index, x.shape[1], source, into, size)
    assert torch.allclose(reduction.apply(x), tensors[f"{case}.x"], atol=1e-6)
    assert torch.allclose(reduction.size(size), tensors[f"{case}.size"][..., 0])
    slots = torch.zeros_like(tensors[f"{case}.source"]).scatter_(1, reduction.owner().unsqueeze(1), 1)
    assert torch.equal(slots, tensors[f"{case}.source"])


@pytest.mark.parametrize(
    ("r", "inflect", "depth", "name"),
    [
        (3, 0, 12, "int 3, 12 layers"),
        (8, -1, 12, "(8, -1), 12"),
        (8, 1, 12, "(8, 1), 12"),
        (7, -0.5, 6, "(7, -0.5), 6"),
    ],
)
def test_tome_schedules_are_the_authors(r, inflect, depth, name):
    method = registry.build("tome", "vit", {"r": r, "inflect": inflect})
    expected = facts("tome")["settings"]["parse_r"][name]
    assert method.schedule(Shape(depth, 1000), None) == expected


@pytest.mark.parametrize("case", TOME_MODEL)
def test_a_tome_model_gives_the_authors_logits(case):
    tensors, told = golden("vit", "tome-model")
    kind, setting = case.split(".")[0], told["settings"][case]
    model = VisionTransformer(**told["settings"][f"{kind} model"]).eval()
    model.load_state_dict(under(tensors, f"{kind}.model."))
    r, inflect = setting["r"], 0.0
    if isinstance(r, list) and len(r) == 2:
        r, inflect = r
    with torch.no_grad(), tprune.prune(model, "tome", r=r, inflect=inflect, prop_attn=setting["prop_attn"]):
        logits = model(tensors["image"].float())
    assert torch.allclose(logits, tensors[f"{case}.logits"], atol=2e-6)


@pytest.mark.parametrize("case", [case for case in EVIT if case.startswith("m")])
def test_an_evit_model_gives_the_authors_logits(case):
    tensors, told = golden("vit", "evit")
    model = VisionTransformer(**told["settings"]["model"]).eval()
    model.load_state_dict(under(tensors, "model."))
    rates = EVIT[case]["keep_rate"]
    # Layers are given for 12 blocks and scale to the 4 of this model.
    layers = tuple(3 * layer for layer, rate in enumerate(rates) if rate < 1)
    ratio = min(rates)
    with (
        torch.no_grad(),
        tprune.prune(model, "evit", layers=layers, ratio=ratio, fuse=EVIT[case]["fuse_token"]) as handle,
    ):
        logits = model(tensors["image"].float())
        mlp = handle.driver.entering[1::2]
    assert torch.allclose(logits, tensors[f"{case}.logits"], atol=2e-6)
    assert mlp == EVIT[case]["non_cls_tokens_after_each_block"]
