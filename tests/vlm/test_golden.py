"""Against the authors' own code, on the same inputs (see tests/golden/vlm/*.json)."""

import json

import pytest
import torch

from tests.golden_values import HERE, golden
from tests.vlm.tiny import tiny
from tprune.core import match
from tprune.core.budget import PROJECTOR, Site, Stage
from tprune.methods import registry
from tprune.methods.attention import Attention
from tprune.methods.token_view import TokenView
from tprune.methods.tokens import Shape
from tprune.models.encoder import Sight
from tprune.models.layout import packed_crops
from tprune.models.projector import Projector
from tprune.models.run import Run
from tprune.models.taps import AttentionCall
from tprune.models.track import Track
from tprune.models.vlm import anatomy

CASES = {
    name: json.loads((HERE / "vlm" / f"{name}.json").read_text())["settings"]["cases"]
    for name in ("divprune", "dart", "fastv", "fastervlm")
}


def prompt(length, start, count):
    """Which tokens of a prompt are image tokens, bool [1, length]."""
    place = torch.arange(length)[None]
    return (place >= start) & (place < start + count)


def attention_of(weights):
    """An `Attention` whose rows are exactly `weights` [B, H, N, N]."""
    keys = torch.eye(weights.shape[-1]).expand(*weights.shape)
    return Attention(weights.log(), keys, keys, 1.0)


@pytest.mark.parametrize("case", [case for case in CASES["divprune"] if case != "Z_duplicates_r0.75"])
def test_divprune_chooses_the_authors_tokens_in_their_order(case):
    tensors, _ = golden("vlm", "divprune")
    hidden = tensors[case.split("_r")[0]][None]
    expected = tensors[f"{case}.order"]
    order = match.farthest_first(hidden, len(expected))[0]
    if "duplicates" in case:
        # Two copies of a vector are told apart by rounding alone.
        assert torch.equal(hidden[0, order].sort(0).values, hidden[0, expected].sort(0).values)
        return
    assert torch.equal(order, expected)
    method = registry.build("divprune", "vlm", {"ratio": CASES["divprune"][case]["ratio"]})
    [stage] = method.stages(Shape(12, hidden.shape[1]), None)
    everything = torch.ones(hidden.shape[:2], dtype=torch.bool)
    reduction = method.reduce(PROJECTOR, TokenView(hidden, everything), stage.count, {})
    assert torch.equal(reduction.index[0], tensors[f"{case}.kept"])


def test_divprune_takes_every_distinct_vector_before_a_copy_and_no_token_twice():
    """Beyond the distinct vectors the authors' picks are rounding, and theirs take some tokens twice."""
    tensors, _ = golden("vlm", "divprune")
    hidden, theirs = tensors["Z_duplicates"], tensors["Z_duplicates_r0.75.order"]
    distinct = CASES["divprune"]["Z_duplicates_r0.75"]["distinct"]
    order = match.farthest_first(hidden[None], len(theirs))[0]
    for picks in (order, theirs):
        assert torch.equal(hidden[picks[:distinct]].sort(0).values, hidden.unique(dim=0).sort(0).values)
    assert len(order.unique()) == len(order)
    assert len(theirs.unique()) < len(theirs)


@pytest.mark.parametrize("case", CASES["dart"])
def test_dart_keeps_the_authors_tokens(case):
    tensors, told = golden("vlm", "dart")
    setting = CASES["dart"][case]
    hidden, keys = tensors["hidden"], tensors["keys"]
    image = prompt(hidden.shape[1], told["settings"]["image_token_start_index"], 48)
    pivots = {"image_pivots": setting["pivot_image_token"], "text_pivots": setting["pivot_text_token"]}
    method = registry.build("dart", "vlm", pivots)
    view = TokenView(
        hidden,
        image,
        whole=False,
        real=torch.ones_like(image),
        attention=Attention(keys, keys, keys, 1.0),
        signals={"final_norm": lambda: hidden},
    )
    index = method.reduce(Site(2), view, setting["kept"], {}).index[0]
    assert torch.equal(index[image[0, index]], tensors[f"{case}.kept_norm_order"])


@pytest.mark.parametrize("case", ["qwen_ratio", "qwen_778"])
def test_darts_own_ratio_keeps_as_many_as_the_authors(case):
    setting = CASES["dart"][case]
    method = registry.build("dart", "vlm", {"reduction": setting["reduction_ratio"]})
    assert method.stages(Shape(32, 48), None)[0].count == setting["kept"]


@pytest.mark.parametrize("case", CASES["fastv"])
def test_fastv_keeps_the_authors_tokens(case):
    tensors, told = golden("vlm", "fastv")
    setting, hidden = CASES["fastv"][case], tensors["hidden"]
    image = prompt(hidden.shape[1], told["settings"]["image_token_start_index"], 30)
    method = registry.build("fastv", "vlm", {"layer": setting["fastv_k"], "ratio": setting["fastv_r"]})
    [stage] = method.stages(Shape(32, 30), None)
    assert stage == type(stage)(Site(setting["fastv_k"]), setting["image_tokens_kept"])
    view = TokenView(
        hidden,
        image,
        whole=False,
        real=torch.ones_like(image),
        attention=attention_of(tensors["attention"]),
    )
    reduction = method.reduce(stage.site, view, stage.count, {})
    assert torch.equal(reduction.index[0], tensors[f"{case}.kept"])
    assert torch.equal(reduction.apply(hidden), tensors[f"{case}.hidden"])


@pytest.mark.parametrize("case", [case for case in CASES["fastervlm"] if not case.startswith("anyres")])
def test_fastervlm_keeps_the_authors_tokens(case):
    tensors, _ = golden("vlm", "fastervlm")
    projected = tensors["features"][:, 1:] @ tensors["projector"]
    everything = torch.ones(projected.shape[:2], dtype=torch.bool)
    encoder = TokenView(
        tensors["features"],
        torch.ones(3, 17, dtype=torch.bool),
        prefix=1,
        has_cls=True,
        attention=attention_of(tensors["attentions"]),
    )
    method = registry.build("fastervlm", "vlm")
    view = TokenView(projected, everything, encoder=encoder, pool=lambda score: score)
    reduction = method.reduce(PROJECTOR, view, CASES["fastervlm"][case]["visual_token_num"], {})
    kept = torch.zeros_like(everything).scatter(1, reduction.index, True)
    assert torch.equal(kept, tensors[f"{case}.mask"])
    assert torch.allclose(reduction.apply(projected), tensors[f"{case}.features"], atol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES["fastervlm"] if case.startswith("anyres")])
def test_fastervlm_lays_crops_out_as_the_authors_do(case):
    """A thumbnail and two crops side by side between text; newline tokens, which the authors' layout lacks, leave."""
    tensors, told = golden("vlm", "fastervlm")
    model, count = tiny("llava-next"), told["settings"]["cases"][case]["visual_token_num"]
    sizes = torch.tensor([[32, 64]])
    [packed] = packed_crops(model.model, model.config, {"image_sizes": sizes})
    projected = tensors["features"][:, 1:] @ tensors["projector"]
    image = torch.full((packed.length, 5), torch.nan)
    for slots, crop in zip(packed.crops, projected, strict=True):
        image[slots] = crop
    text = tensors["embed_tokens"]
    embeds = torch.cat([text[[1, 2]], image, text[[3, 4]]])[None]
    length = embeds.shape[1]
    mask = prompt(length, 2, packed.length)

    method = registry.build("fastervlm", "vlm")
    parts = anatomy(model)
    projector = Projector(model, parts, method, lambda _: (Stage(PROJECTOR, count),), 0)
    seen = attention_of(tensors["attentions"])
    call = AttentionCall(model, seen.query, seen.key, seen.value, None, seen.scale, causal=False)
    inputs, block = {"pixel_values": torch.zeros(1, 3, 3, 32, 32), "image_sizes": sizes}, parts.projected
    projector.latest = Sight(parts, inputs, {block: [call]}, {block: tensors["features"]})
    run = Run({}, Track(length, torch.tensor([length])), 0, length, mask, torch.ones_like(mask))
    found, _, valid = projector(run, embeds)
    projector.remove()
    assert valid is None
    assert torch.allclose(found, tensors[f"{case}.embeds"], atol=1e-6)
