"""Methods inside the decoder against the authors' own code, stage after stage (see tests/golden/vlm/*.json)."""

import json

import pytest
import torch

from tests.golden_values import HERE, golden
from tests.vlm.test_golden import prompt
from tprune.core.budget import PROJECTOR, Site, mean_leaving
from tprune.core.grid import far_apart
from tprune.methods import registry
from tprune.methods.attention import Attention
from tprune.methods.token_view import TokenView
from tprune.methods.tokens import Shape


def cases(name):
    return json.loads((HERE / "vlm" / f"{name}.json").read_text())["settings"].get("cases")


def view_of(hidden, start, image, **more):
    """A prompt of one row whose image tokens begin at `start`."""
    length = hidden.shape[1]
    mask = prompt(length, start, image)
    return TokenView(
        hidden, mask, whole=False, real=torch.ones_like(mask), position=torch.arange(length)[None], **more
    )


def given(weights):
    """An `Attention` whose map is `weights` [B, H, N, N]."""
    return Attention(weights, weights, weights, 1.0, map=weights)


def causal(query, key):
    return Attention(query, key, key, query.shape[-1] ** -0.5, causal=True)


def rotated_ones(position, width):
    """A query of ones at `position` [1, N], turned by plain RoPE of base 10,000: [1, N, width]."""
    angle = position.unsqueeze(2) * 10_000.0 ** (-torch.arange(0, width, 2) / width)
    return torch.cat([angle.cos() - angle.sin(), angle.cos() + angle.sin()], 2)


@pytest.mark.parametrize("name", ["pyramiddrop", "transprune"])
def test_stages_that_look_ahead_let_the_authors_tokens_go_on(name):
    tensors, told = golden("vlm", name)
    settings, memory = told["settings"], {}
    alive, start = settings["image_tokens"], settings["image_token_posi"]
    method = registry.build(name, "vlm", {"ratios": settings["ratios"]})
    left = {stage.site.layer: stage.count for stage in method.stages(Shape(32, alive), None)}
    for stage, layer in enumerate(method.layers):
        hidden, query, key = (tensors[f"stage{stage}.{part}"] for part in ("hidden", "query", "key"))
        signals = {"next_attention": lambda query=query, key=key: causal(query, key)}
        looks = settings.get("looks", [1] * 3)[stage]
        for look in range(looks):
            passed = [
                tuple(tensors.get(f"stage{stage}.{look}.{part}.{way}") for way in ("in", "out"))
                for part in ("attn", "mlp")
            ]
            signals["sublayers"] = lambda passed=passed: passed
            view, site = view_of(hidden, start, alive, depth=32, signals=signals), layer - looks + look + 1
            reduction = method.reduce(Site(site), view, left[site], memory)
            assert (reduction is None) == (site != layer)
        expected = tensors[f"stage{stage}.left"]
        assert torch.equal(reduction.apply(hidden), expected)
        assert torch.equal(tensors[f"stage{stage}.positions"], torch.arange(expected.shape[1])[None])
        alive = left[layer]


@pytest.mark.parametrize("case", cases("sparsevlm"))
def test_sparsevlm_keeps_and_recycles_what_the_authors_do(case):
    tensors, told = golden("vlm", "sparsevlm")
    settings, setting = told["settings"], cases("sparsevlm")[case]
    method = registry.build("sparsevlm", "vlm", {"version": setting["version"]})
    alive, memory = setting["image_tokens"], {}
    for stage, (kept, left) in enumerate(zip(setting["table"], setting["left"], strict=True)):
        assert left == kept + method.clusters(alive - kept)
        part = {
            name: tensors[f"{case}.stage{stage}.{name}"] for name in ("attention", "hidden", "left", "before")
        }
        signals = {
            "embeddings": lambda: tensors[f"{case}.embeddings"],
            "rotated_ones": lambda part=part: rotated_ones(part["before"], settings["rotary_width"]),
        }
        view = view_of(
            part["hidden"],
            settings["image_token_start"],
            alive,
            attention=given(part["attention"]),
            signals=signals,
        )
        reduction = method.reduce(Site(3), view, left, memory)
        assert torch.allclose(reduction.apply(part["hidden"]), part["left"], atol=2e-6)
        positions = tensors[f"{case}.stage{stage}.positions"]
        if setting["version"] == "v1":
            assert torch.equal(positions, torch.arange(positions.shape[1])[None])
        else:
            assert torch.equal(part["before"].gather(1, reduction.index), positions)
        alive = left


@pytest.mark.parametrize(("retain", "mean"), [(192, 192.0), (128, 128.6), (96, 96.9), (64, 64.8)])
def test_sparsevlms_tables_leave_the_tokens_they_are_named_after(retain, mean):
    method = registry.build("sparsevlm", "vlm", {"retain": retain})
    assert 576 * mean_leaving(method.stages(Shape(32, 576), None), 576, 32) == pytest.approx(mean, abs=0.05)


@pytest.mark.parametrize("case", cases("feather"))
def test_feather_keeps_the_authors_tokens_and_their_positions(case):
    tensors, told = golden("vlm", "feather")
    settings, setting = told["settings"], cases("feather")[case]
    side, start = setting["side"], settings["image_token_start"]
    chosen = {"reduction": setting["reduction"], "stride": setting["stride"]}
    place = torch.arange(side * side)
    length = start + side * side + settings["text_behind"]
    cells = torch.full((1, length, 3), -1)
    cells[0, start : start + side * side] = torch.stack([place * 0, place // side, place % side], 1)
    for exact in (False, True):
        method = registry.build("feather", "vlm", chosen | {"exact": exact})
        position, alive, memory = torch.arange(length)[None], side * side, {}
        stages = method.stages(Shape(32, side * side), None)
        for stage, (site, left) in enumerate(zip(stages, setting["left"], strict=True)):
            part = {name: tensors[f"{case}.stage{stage}.{name}"] for name in ("query", "key")}
            view = view_of(
                torch.zeros(1, position.shape[1], 1),
                start,
                alive,
                signals={
                    "unrotated_attention": lambda part=part: causal(part["query"], part["key"]),
                    "cells": lambda position=position: cells[:, position[0]],
                },
            )
            if not exact:
                assert left <= site.count
            reduction = method.reduce(site.site, view, left if exact else site.count, memory)
            position, alive = position.gather(1, reduction.index), left
            assert torch.equal(position, tensors[f"{case}.stage{stage}.positions"])


def test_aim_hides_the_authors_tokens_layer_after_layer_until_none_is_left():
    tensors, told = golden("vlm", "aim")
    settings = told["settings"]
    method, start = registry.build("aim", "vlm"), settings["image_token_start"]
    length = start + settings["image_tokens"] + settings["text_behind"]
    image = prompt(length, start, settings["image_tokens"])
    visible = torch.ones(1, length, dtype=torch.bool)
    stages = method.stages(Shape(28, 4 * settings["image_tokens"]), None)[1:]
    for layer, stage in zip(range(14, 22), stages, strict=True):
        assert stage.site == Site(layer + 1)
        query, key = tensors[f"layer{layer}.query"], tensors[f"layer{layer}.key"]
        seen = torch.ones(length, length, dtype=torch.bool).tril() & visible[:, None, None]
        hidden = image & ~visible
        view = TokenView(
            torch.zeros(1, length, 1),
            image & visible,
            whole=False,
            real=visible,
            attention=Attention(query, key, key, 0.5, bias=seen),
            signals={"hidden": lambda hidden=hidden: hidden},
        )
        importance = method.rank(view)
        expected = tensors[f"layer{layer}.importance"]
        assert torch.allclose(importance, expected, atol=1e-6)
        index = method.reduce(stage.site, view, stage.count, {}).index
        visible = visible & torch.zeros_like(visible).scatter(1, index, True)
        assert torch.equal(visible, tensors[f"layer{layer}.visible"])
    assert not (visible & image).any()


@pytest.mark.parametrize(("name", "count"), [("quarter", 9), ("uneven", 25)])
def test_aim_merges_an_image_as_the_authors_do(name, count):
    tensors, _ = golden("vlm", "aim")
    features = tensors["merge.features"]
    everything = torch.ones(features.shape[:2], dtype=torch.bool)
    reduction = registry.build("aim", "vlm").reduce(PROJECTOR, TokenView(features, everything), count, {})
    assert torch.allclose(reduction.apply(features), tensors[f"merge.{name}"], atol=1e-6)


@pytest.mark.parametrize("case", cases("adaptinfer"))
def test_adaptinfer_keeps_the_authors_tokens(case):
    tensors, told = golden("vlm", "adaptinfer")
    settings, setting = told["settings"], cases("adaptinfer")[case]
    method = registry.build("adaptinfer", "vlm", {"sharpness": setting["lb"]})
    alive, start = settings["image_tokens"], settings["image_token_start"]
    for stage, count in enumerate(setting["table"]):
        attention = tensors[f"{case}.stage{stage}.attention"]
        view = view_of(torch.zeros(1, attention.shape[2], 1), start, alive, attention=given(attention))
        index = method.reduce(Site(2), view, count, {}).index[0]
        kept = index[(index >= start) & (index < start + alive)] - start
        assert kept.tolist() == tensors[f"{case}.stage{stage}.mask"][0].nonzero().flatten().tolist()
        alive = count


def test_btp_keeps_the_tokens_of_a_copy_of_the_authors_code():
    tensors, told = golden("vlm", "btp")
    settings, method = told["settings"], registry.build("btp", "vlm")
    start, alive = settings["image_token_start"], settings["image_tokens"]
    apart = far_apart((24, 24), 144).nonzero().flatten()
    assert torch.equal(apart, tensors["grid"])
    length, place = start + alive + settings["text_behind"], torch.arange(alive)
    cells = torch.full((1, length, 3), -1)
    cells[0, start : start + alive] = torch.stack([place * 0, place // 24, place % 24], 1)
    position = torch.arange(length)[None]
    stages = method.stages(Shape(32, alive), None)
    assert [stage.count for stage in stages] == [288, 144, 48, 0]
    for number, stage in enumerate(stages):
        hidden = tensors.get(f"stage{number}.hidden", torch.zeros(1, position.shape[1], 6))
        view = view_of(hidden, start, alive, depth=32, signals={"cells": lambda at=position: cells[:, at[0]]})
        if number < 3:
            row = tensors[f"stage{number}.last_row"]
            query = torch.zeros(*row.shape[:2], hidden.shape[1], 1)
            view.attention = Attention(query, query, query, 1.0, map=row.expand(-1, -1, hidden.shape[1], -1))
        position = position.gather(1, method.reduce(stage.site, view, stage.count, {}).index)
        assert torch.equal(position, tensors[f"stage{number}.positions"])
        alive = stage.count


@pytest.mark.parametrize("case", cases("vla-pruner"))
def test_vla_pruner_joins_prompt_and_history_as_the_authors_do(case):
    tensors, told = golden("vlm", "vla-pruner")
    settings, setting = told["settings"], cases("vla-pruner")[case]
    chosen = {"reduction": setting["reduction"], "rows": setting["rows"], "warm_up": setting["history"]}
    method = registry.build("vla-pruner", "vlm", chosen)
    embeddings, images = tensors["embeddings"], settings["image_tokens"]
    view = view_of(
        embeddings,
        settings["image_token_start"],
        images,
        attention=given(tensors["attention"]),
        signals={"embeddings": lambda: embeddings},
    )
    [stage] = method.stages(Shape(32, images), None)
    episode = {"history": list(tensors["history"].unsqueeze(1))} if setting["history"] else {}
    index = method.reduce(stage.site, view, stage.count, {"episode": episode}).index
    assert torch.equal(index, tensors[f"{case}.positions"])


@pytest.mark.parametrize("case", ["one", "two"])
def test_corematching_keeps_what_the_authors_do_not_blank(case):
    tensors, told = golden("vlm", "corematching")
    start, images = (told["settings"][name] for name in ("image_token_start", "image_tokens"))
    neurons = tensors[f"{case}.neurons"]
    view = view_of(neurons, start, images, signals={"neurons": lambda: neurons})
    index = registry.build("corematching", "vlm").reduce(Site(10), view, images, {}).index[0]
    assert torch.equal(index, tensors[f"{case}.kept"].nonzero().flatten())
