"""Methods that choose before the decoder, against the authors' own code (see tests/golden/vlm/*.json)."""

import pytest
import torch

from tests.golden_values import golden
from tprune.core import outliers, score
from tprune.core.budget import PROJECTOR, Site
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.attention import Attention
from tprune.methods.token_view import TokenView
from tprune.methods.tokens import Shape
from tprune.methods.vlm.recoverable import Recoverable


def keyed(keys):
    """A view of tokens of which only the keys [1, N, d] are known."""
    everything = torch.ones(keys.shape[:2], dtype=torch.bool)
    attention = Attention(keys[:, None], keys[:, None], keys[:, None], 1.0)
    return TokenView(keys, everything, real=everything, attention=attention)


@pytest.mark.parametrize("case", ["default", "authors", "loose", "none", "alone"])
def test_saint_drops_the_authors_tokens_layer_after_layer_inside_a_decoder(case):
    tensors, told = golden("vlm", "saint-vlm")
    setting = {name: told["settings"]["llm"][case][name] for name in ("threshold", "partners", "gamma")}
    method = registry.build("saint-vlm", "vlm", setting)
    alive = torch.arange(49)
    for step in range(3):
        view = keyed(tensors["keys"][:, alive])
        alive = alive[method.reduce(Site(8 + step), view, len(alive), {}).index[0]]
        assert torch.equal(alive, tensors[f"llm.{case}.{step}"])


@pytest.mark.parametrize("case", ["k33_r16", "k20_r4", "k8_r16", "k49_r5"])
def test_saint_keeps_the_authors_patches_in_a_vision_tower(case):
    tensors, told = golden("vlm", "saint-vlm")
    setting = told["settings"]["vit"][case]
    method = registry.build("saint-vlm", "vlm", {"divisor": setting["r"]})
    tower = keyed(torch.cat([tensors["cls_key"], tensors["keys"]], 1))
    tower.prefix, tower.depth = 1, 24
    view = keyed(tensors["keys"])
    view.encoder, view.encoders, view.pool = tower, {19: tower}, lambda x: x
    reduction = method.reduce(PROJECTOR, view, setting["left"], {})
    assert torch.equal(reduction.index[0], tensors[f"vit.{case}"])


@pytest.mark.parametrize("case", ["authors", "quarter", "loose", "strict"])
def test_g_prune_keeps_the_authors_tokens_of_thumbnail_and_crops(case):
    tensors, told = golden("vlm", "g-prune")
    setting = told["settings"]["cases"][case]
    hidden = tensors["features"][None]
    everything, place = torch.ones(hidden.shape[:2], dtype=torch.bool), torch.arange(hidden.shape[1])
    thumbnail = (place < 16)[None]
    newlines = ((place >= 16) & ((place - 16) % 9 == 8))[None]
    signals = {"thumbnail": lambda: thumbnail, "newlines": lambda: newlines}
    view = TokenView(hidden, everything, real=everything, signals=signals)
    known = {name: setting[name] for name in ("threshold", "temperature", "steps")}
    method = registry.build("g-prune", "vlm", known)
    worth = method.worth(view, thumbnail, newlines)[0]
    assert torch.allclose(worth[:16], tensors[f"{case}.thumbnail"], rtol=1e-4)
    assert torch.allclose(worth[16:][~newlines[0, 16:]], tensors[f"{case}.canvas"], rtol=1e-4)
    assert torch.equal(method.reduce(PROJECTOR, view, setting["kept"], {}).index[0], tensors[f"{case}.kept"])


@pytest.mark.parametrize("case", ["a", "b", "c", "d"])
def test_outlier_factors_are_scikit_learns(case):
    tensors, _ = golden("vlm", "recoverable")
    x = tensors[f"{case}.attention"]
    there = torch.ones_like(x, dtype=torch.bool)
    padded = torch.cat([x, torch.full((1, 5), 0.5)], 1)
    for neighbours in (10, 20):
        expected = tensors[f"{case}.lof{neighbours}"].double()
        found = outliers.local_outlier_factor(x, neighbours, there)
        assert torch.allclose(found, expected, rtol=1e-4)
        some = torch.nn.functional.pad(there, (0, 5))
        assert torch.allclose(outliers.local_outlier_factor(padded, neighbours, some)[:, :64], found)


@pytest.mark.parametrize("case", ["a", "b", "c", "d"])
def test_recoverable_hands_the_projector_what_the_authors_do(case):
    tensors, told = golden("vlm", "recoverable")
    hidden, query, key = (tensors[f"{case}.{name}"] for name in ("hidden", "query", "key"))

    class GivenText(Recoverable):
        def relevance(self, view):
            return tensors[f"{case}.text"]

    prunable = torch.ones(hidden.shape[:2], dtype=torch.bool)
    tower = TokenView(hidden, prunable, prefix=1, depth=24, has_cls=True)
    tower.attention = Attention(query[:, None], key[:, None], key[:, None], 1.0)
    view = TokenView(hidden, prunable.index_fill(1, torch.tensor([0]), False), prefix=1, encoder=tower)
    view.encoders, view.pool = {23: tower}, lambda x: x
    method = GivenText(neighbours=told["settings"]["neighbours"])
    reduction = method.reduce(PROJECTOR, view, 64, {})
    assert torch.allclose(reduction.apply(hidden), tensors[f"{case}.out"], atol=1e-5)


def one_image(tokens, **signals):
    """A view of a whole image's tokens [1, N, D], each a patch or a newline."""
    everything = torch.ones(tokens.shape[:2], dtype=torch.bool)
    known = {"rows": lambda: torch.zeros(1, dtype=torch.int64)} | {
        name: (lambda value=value: value) for name, value in signals.items()
    }
    place = torch.arange(tokens.shape[1])[None]
    return TokenView(tokens, everything, real=everything, position=place, pool=lambda x: x, signals=known)


@pytest.mark.parametrize("case", golden("vlm", "vflowopt")[1]["settings"]["scores"])
def test_vflowopt_scores_by_the_authors_hubs_and_entropy(case):
    tensors, told = golden("vlm", "vflowopt")
    shown = (tensors["pixels"].float() / 255 + 1e-4).clamp(0, 1)
    patches = shown.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).flatten(4).flatten(1, 2)
    assert torch.allclose(score.patch_entropy(patches), tensors["bits"], atol=1e-5)
    hidden, none = torch.zeros(2, 36, 4), torch.zeros(2, 36, dtype=torch.bool)
    tower = TokenView(hidden, ~none, depth=26)
    tower.attention = Attention(tensors["query"], tensors["key"], tensors["key"], 0.5)
    view = one_image(hidden, patches=patches, newlines=none)
    view.encoder = tower
    method = registry.build("vflowopt", "vlm", told["settings"]["scores"][case])
    assert torch.allclose(method.importance(view), tensors[f"score.{case}"], atol=1e-6)


@pytest.mark.parametrize("case", golden("vlm", "vflowopt")[1]["settings"]["cases"])
def test_vflowopt_prunes_and_recycles_as_the_authors_do(case):
    tensors, told = golden("vlm", "vflowopt")
    tokens, worth, place = tensors["tokens"][None], tensors["worth"][None], torch.arange(939)
    newline = (place >= 729) & ((place - 729) % 21 == 20)
    view = one_image(tokens, newlines=newline[None], thumbnail=(place < 729)[None])
    method = registry.build("vflowopt", "vlm", told["settings"]["cases"][case])
    reduction = method.recycled(view, worth, 939)
    assert torch.allclose(reduction.apply(tokens)[0], tensors[f"{case}.tokens"], atol=1e-5)
    assert torch.equal(worth[0, reduction.index[0]], tensors[f"{case}.worth"])
    for count in (939, 600, len(tensors[f"{case}.tokens"]), 20, 1):
        exact = method.counted().recycled(view, worth, count)
        assert exact.index.shape[1] == count
        weight = exact.matrix()[0].sum(1)
        assert torch.allclose(weight, torch.ones(count), atol=1e-5)
    assert torch.equal(method.counted().recycled(view, worth, 939).apply(tokens), tokens)
    assert torch.allclose(
        method.counted().recycled(view, worth, len(tensors[f"{case}.tokens"])).apply(tokens)[0],
        tensors[f"{case}.tokens"],
        atol=1e-5,
    )


@pytest.mark.parametrize("settings", [{"vision": 0.0}, {"decoder": (0.5, 0.0)}])
def test_vflowopt_scales_no_fraction_of_nothing_to_a_budget(settings):
    method = registry.build("vflowopt", "vlm", settings).counted()
    with pytest.raises(UserError, match="vision or decoder of 0 cannot be scaled to a budget"):
        method.stages(Shape(28, 144), 0.5)
