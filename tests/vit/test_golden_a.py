"""saint, ppt, gtp and atc against the authors' own code, token-transforming against its formulas (tests/golden/vit)."""

import json

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import tprune
from tests.conftest import tiny_vit
from tests.golden_values import HERE, golden, under
from tprune.core import match
from tprune.core.budget import Site
from tprune.core.reduction import Reduction
from tprune.core.score import cls_times_value_norm, cosine_normalise, redundancy
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.attention import Attention
from tprune.methods.token_view import TokenView


def settings(name):
    return json.loads((HERE / "vit" / f"{name}.json").read_text())["settings"]


def model_of(name):
    tensors, told = golden("vit", name)
    model = VisionTransformer(**told["settings"]["model"]).eval().requires_grad_(False)
    model.load_state_dict(under(tensors, "model."))
    return model, tensors


def of_twelve(layers):
    """Blocks of the 4 of these models as blocks of 12."""
    return tuple(3 * layer for layer in layers)


def seen(metric, prefix):
    """A view of tokens whose keys, the same in both heads, are `metric` [B, N, d]."""
    key = metric.unsqueeze(1).expand(-1, 2, -1, -1)
    batch, length = metric.shape[:2]
    return TokenView(
        hidden=metric,
        prunable=torch.arange(length).ge(prefix).expand(batch, -1),
        prefix=prefix,
        depth=4,
        attention=Attention(key, key, key, 1.0),
    )


@pytest.mark.parametrize("rows", ["all", "first", "second", "third"])
@pytest.mark.parametrize("case", settings("saint")["cases"])
def test_saint_drops_as_the_authors_do(case, rows):
    tensors, _ = golden("vit", "saint")
    given = settings("saint")["cases"][case]
    chosen = {"all": slice(0, 3), "first": slice(0, 1), "second": slice(1, 2), "third": slice(2, 3)}[rows]
    metric, x = tensors["metric"][chosen], tensors["x"][chosen]
    method = registry.build(
        "saint",
        "vit",
        {
            "threshold": given["sim_threshold"],
            "partners": given.get("K", 5),
            "gamma": given.get("gamma", 10.0),
        }
        | {"counts": "batch"},
    )
    prefix = given.get("class_token", False) + given.get("distill_token", False)
    reduction = method.reduce(Site(0, between=True), seen(metric, prefix), metric.shape[1], {})
    expected = tensors[f"{case}.{rows}"]
    if expected.shape[1] == x.shape[1]:
        assert reduction.count == x.shape[1]
    else:
        assert torch.equal(reduction.apply(x), expected)


@pytest.mark.parametrize("rows", ["all", "first", "second"])
@pytest.mark.parametrize("case", settings("saint")["models"])
def test_a_saint_model_gives_the_authors_logits(case, rows):
    model, tensors = model_of("saint")
    image = tensors["image"].float()[{"all": slice(0, 3), "first": slice(0, 1), "second": slice(1, 2)}[rows]]
    given = settings("saint")["models"][case]
    with tprune.prune(model, "vit/saint", threshold=given["sim_threshold"], counts="batch") as handle:
        logits = model(image)
        assert handle.driver.entering[1::2] == given["patches_after_each_block"][rows]
    assert torch.allclose(logits, tensors[f"{case}.{rows}.logits"], atol=2e-6)


def test_saint_images_in_a_batch_keep_what_they_keep_alone():
    model, tensors = model_of("saint")
    image = tensors["image"].float()
    with tprune.prune(model, "vit/saint", threshold=0.5):
        together = model(image)
        alone = torch.cat([model(one[None]) for one in image])
    assert torch.allclose(together, alone, atol=1e-5)
    for place, rows in enumerate(["first", "second"]):
        assert torch.allclose(together[place], tensors[f"m05.{rows}.logits"][0], atol=1e-5)


def test_tokens_that_are_all_alike_are_all_redundant_and_orthogonal_ones_are_not():
    alike = redundancy(torch.ones(1, 6, 6), torch.ones(1, 6, dtype=torch.bool), 0.75, 10.0)[1]
    apart = redundancy(torch.zeros(1, 6, 6), torch.ones(1, 6, dtype=torch.bool), 0.75, 10.0)[1]
    assert (alike == 6).all()
    assert (apart == 0).all()


def test_saint_with_fixed_numbers_needs_a_budget():
    with pytest.raises(UserError, match="leaves the numbers to --keep"):
        tprune.prune(tiny_vit(), "vit/saint", counts="keep")


def test_ppt_scores_as_the_authors_do():
    tensors, _ = golden("vit", "ppt")
    score = cls_times_value_norm(tensors["attn"][:, :, 0], tensors["v"])[:, 1:]
    assert torch.allclose(score / score.sum(1, keepdim=True), tensors["scores"], atol=1e-7)


@pytest.mark.parametrize("case", settings("ppt")["models"])
def test_a_ppt_model_gives_the_authors_logits(case):
    model, tensors = model_of("ppt")
    given = settings("ppt")["models"][case]
    # The threshold is for 196 patches, the model has 36.
    options = {
        "layers": of_twelve(given["layers"]),
        "r": given["r"],
        "threshold": given["theta"] * (36 / 196) ** 2,
    }
    with tprune.prune(model, "vit/ppt", **options) as handle:
        logits = model(tensors["image"].float())
        assert handle.driver.entering[1::2] == given["patches_after_each_block"]
        size = handle.driver.size
    assert torch.allclose(size, tensors[f"{case}.size"], atol=1e-5)
    assert torch.allclose(logits, tensors[f"{case}.logits"], atol=5e-6)


GTP_SCORES = {
    "MixedAttnMax": ("mixed", "max"),
    "MixedAttnMean": ("mixed", "mean"),
    "IMGAttnMean": ("received", "mean"),
    "DiagAttnMax": ("diagonal", "max"),
    "CLSAttnMean": ("cls", "mean"),
}


@pytest.mark.parametrize("case", settings("gtp")["models"])
def test_a_gtp_model_gives_the_authors_logits(case):
    model, tensors = model_of("gtp")
    given = settings("gtp")["models"][case]
    score, heads = GTP_SCORES[given["selection"]]
    options = {
        "p": given["num_prop"],
        "theta": given["sparsity"],
        "alpha": given["alpha"],
        "neighbours": given["num_neighbours"],
        "graph": given["graph_type"].lower(),
        "score": score,
        "heads": heads,
        "token_scale": given["token_scale"],
    }
    with tprune.prune(model, "vit/gtp", **options) as handle:
        logits = model(tensors["image"].float())
        assert handle.driver.entering[1::2] == given["patches_after_each_block"]
        size, graph = handle.driver.size, handle.driver.memory["graph"]
    assert torch.allclose(logits, tensors[f"{case}.logits"], atol=5e-6)
    if f"{case}.scale" in tensors:
        assert torch.allclose(size, tensors[f"{case}.scale"], atol=1e-5)
    if f"{case}.graph" in tensors:
        assert torch.allclose(graph[:1], tensors[f"{case}.graph"], atol=1e-6)


def test_gtp_without_a_grid_asks_for_the_semantic_graph():
    method = registry.build("gtp", "vit")
    with pytest.raises(UserError, match="graph=semantic"):
        method.check(shape(grid=None))


def shape(**changes):
    from tprune.methods.tokens import Shape

    return Shape(**({"depth": 4, "tokens": 36, "prefix": 1, "has_cls": True, "grid": (6, 6)} | changes))


@pytest.mark.parametrize("case", settings("atc")["cases"])
def test_atc_clusters_as_the_authors_do(case):
    tensors, _ = golden("vit", "atc")
    given = settings("atc")["cases"][case]
    unit = cosine_normalise(tensors["metric"][:, 1:])
    index, source, into = match.agglomerate(
        1 - unit @ unit.transpose(1, 2), given["clusters"], given["linkage"]
    )
    head = torch.zeros(3, 1, dtype=torch.int64)
    reduction = Reduction.average(
        torch.cat([head, index + 1], 1), 21, source + 1, into + 1, tensors["size"][..., 0]
    )
    # Their clusters are numbered by scikit-learn, ours stand in the order of their first tokens.
    theirs = tensors[f"{case}.labels"].gather(1, reduction.index)
    labels = theirs.gather(1, reduction.owner())
    assert torch.equal(labels, tensors[f"{case}.labels"])
    order = theirs.unsqueeze(2)
    assert torch.allclose(
        reduction.apply(tensors["x"]), tensors[f"{case}.x"].gather(1, order.expand(-1, -1, 5)), atol=1e-6
    )
    assert torch.equal(
        reduction.size(tensors["size"][..., 0]), tensors[f"{case}.size"].gather(1, order)[..., 0]
    )


@pytest.mark.parametrize("case", settings("atc")["models"])
def test_an_atc_model_gives_the_authors_logits(case):
    model, tensors = model_of("atc")
    given = settings("atc")["models"][case]
    options = {name: given[name] for name in ("linkage", "ratio", "prop_attn")}
    with tprune.prune(model, "vit/atc", layers=of_twelve(given["layers"]), **options) as handle:
        logits = model(tensors["image"].float())
        assert handle.driver.entering[1::2] == given["patches_after_each_block"]
    assert torch.allclose(logits, tensors[f"{case}.logits"], atol=5e-6)


def test_one_cluster_is_the_mean_of_all_and_equal_tokens_cluster_by_place():
    distance = torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(0))
    index, source, into = match.agglomerate(distance + distance.transpose(1, 2), 1, "average")
    assert index.tolist() == [[0], [0]]
    assert not into.any()
    assert source.tolist() == [[1, 2, 3, 4, 5, 6]] * 2
    for count in (1, 3, 7):
        assert match.agglomerate(torch.zeros(1, 7, 7), count, "single")[0].shape == (1, count)


def test_atc_merges_in_every_block_where_asked_to():
    with tprune.prune(tiny_vit(), "vit/atc", r=3) as handle:
        assert handle.driver.entering == [16, 13, 13, 10, 10, 7, 7, 4]


def test_token_transforming_deals_every_token_out_over_the_informative_ones():
    """An oracle in plain loops."""
    generator = torch.Generator().manual_seed(3)
    query, key, x = (torch.randn(2, 3, 9, 4, generator=generator) for _ in range(3))
    size = torch.rand(2, 9, generator=generator) + 0.5
    view = seen(x.mean(1), 1)
    view.attention, view.size, view.has_cls = Attention(query, key, key, 0.5), size, True
    method = registry.build("token-transforming", "vit", {"temperature": 0.1})
    reduction = method.reduce(Site(0, between=True), view, 3, {})
    out, mass = reduction.apply(view.hidden), reduction.size(size)
    for b in range(2):
        row = torch.stack([torch.softmax(query[b, h, 0] @ key[b, h].T * 0.5, -1) for h in range(3)]).mean(0)
        best = sorted(sorted(range(1, 9), key=lambda i: -row[i])[:3])
        assert reduction.index[b].tolist() == [0, *best]
        metric = key[b].mean(0)
        alike = {
            (j, i): torch.exp(torch.cosine_similarity(metric[j], metric[i], dim=0) / 0.1)
            for j in best
            for i in range(1, 9)
        }
        total = {i: sum(alike[j, i] for j in best) for i in range(1, 9)}
        assert torch.allclose(out[b, 0], view.hidden[b, 0], atol=1e-6)
        for slot, j in enumerate(best, start=1):
            shares = {i: alike[j, i] / total[i] * size[b, i] for i in range(1, 9)}
            assert torch.allclose(mass[b, slot], sum(shares.values()), rtol=1e-5)
            mean = sum(share * view.hidden[b, i] for i, share in shares.items()) / sum(shares.values())
            assert torch.allclose(out[b, slot], mean, atol=1e-5)
    assert torch.allclose(mass.sum(1), size.sum(1), rtol=1e-5)
