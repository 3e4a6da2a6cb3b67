"""ToDRE and ZOO-Prune against plain loops and ZOO-Prune's authors, and what ToDRE does late in the decoder."""

import pytest
import torch
from torch import nn

import tprune
from tests.golden_values import golden
from tests.vlm.test_golden_before import image, tower
from tests.vlm.tiny import IMAGE, tiny
from tprune.core.budget import PROJECTOR
from tprune.methods import registry
from tprune.methods.attention import Attention
from tprune.models.prompts import noise_prompts


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("dispersion", ["sum", "min"])
def test_todre_disperses_from_the_thumbnails_most_attended_token(dispersion, generator):
    hidden = torch.randn(2, 20, 6, generator=generator)
    query = torch.randn(2, 2, 21, 4, generator=generator)
    seen = tower(torch.zeros(2, 21, 8), Attention(query, query, query, 0.5))
    thumbnail = torch.arange(20).expand(2, -1) < 8
    view = image(hidden, seen, encoders={23: seen}, signals={"thumbnail": lambda: thumbnail})
    method = registry.build("todre", "vlm", {"dispersion": dispersion})
    index = method.reduce(PROJECTOR, view, 7, {}).index
    paid = (query[:, :, :1] @ query.transpose(2, 3) * 0.5).softmax(-1).mean(1)[:, 0, 1:]
    for row in range(2):
        unit = nn.functional.normalize(hidden[row], dim=1)
        picks = [int(paid[row, :8].argmax())]
        while len(picks) < 7:
            near = unit @ unit[picks].T
            worth = near.sum(1) if dispersion == "sum" else near.amax(1)
            picks.append(int(worth.index_fill(0, torch.tensor(picks), torch.inf).argmin()))
        assert index[row].tolist() == sorted(picks)


@pytest.mark.parametrize("kind", ["llava", "qwen2-vl"])
@pytest.mark.parametrize(("tau", "left"), [(0.0, 4), (0.5, None), (1.0, 0)])
def test_todre_drops_what_the_text_hardly_looks_at(kind, tau, left):
    model = tiny(kind)
    inputs = noise_prompts(model, 2, 0)
    tokens = int((inputs["input_ids"][0] == IMAGE).sum())
    ratio = 0.25
    with tprune.prune(model, "vlm/todre", tau=tau, ratio=ratio) as handle:
        cache = model(**inputs, use_cache=True).past_key_values
        kept = handle.driver.tally.owner >= 0
        told = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    text = inputs["input_ids"].shape[1] - tokens
    first = round(ratio * tokens)
    assert cache.layers[0].keys.shape[2] == text + first
    images = (kept & (inputs["input_ids"] == IMAGE)).sum(1)
    assert set(images.tolist()) <= {0, first}
    if left is not None:
        assert set(images.tolist()) == {first if left else 0}
        assert cache.layers[-1].keys.shape[2] == text + (first if left else 0)
    assert told.shape[1] == inputs["input_ids"].shape[1] + 3


def test_todre_asks_the_text_of_a_padded_prompt_alone():
    model = tiny("llava")
    inputs = noise_prompts(model, 2, 0)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    inputs["input_ids"] = nn.functional.pad(inputs["input_ids"], (4, 0), value=7)
    inputs["attention_mask"] = nn.functional.pad(inputs["attention_mask"], (4, 0))
    with tprune.prune(model, "vlm/todre", tau=1.0, ratio=0.5) as handle:
        model(**inputs)
        kept = handle.driver.tally.owner >= 0
    assert not (kept & (inputs["input_ids"] == IMAGE)).any()


def sensitivity(view, directions=400, step=0.01):
    return registry.build("zoo-prune", "vlm", {"directions": directions, "step": step}).sensitivity(view)


def projected(features, project):
    signals = {"features": lambda: features, "projector": lambda: project}
    return image(project(features), signals=signals, seeds=torch.arange(len(features)))


def test_zoo_prunes_sensitivity_is_the_mean_norm_of_jacobian_vector_products(generator):
    project = nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Linear(16, 7))
    for parameter in project.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    features = torch.randn(2, 6, 5, generator=generator)
    found = sensitivity(projected(features, project))
    noise = nn.functional.normalize(torch.randn(20000, 5, generator=generator), dim=1)
    for row in range(2):
        for place in range(6):
            jacobian = torch.func.jacrev(project)(features[row, place])
            assert found[row, place] == pytest.approx(float((noise @ jacobian.T).norm(dim=1).mean()), rel=0.1)


@pytest.mark.parametrize("case", golden("vlm", "zoo-prune")[1]["settings"]["cases"])
def test_zoo_prunes_sensitivity_and_picks_are_the_authors(case):
    tensors, told = golden("vlm", "zoo-prune")
    setting = told["settings"]["cases"][case]
    one, two = ((tensors[f"weight.{layer}"], tensors[f"bias.{layer}"]) for layer in range(2))
    linear, gelu = nn.functional.linear, nn.functional.gelu
    view = projected(tensors["features"], lambda x: linear(gelu(linear(x, *one)), *two))
    view.seeds += setting["seed"]
    built = registry.build("zoo-prune", "vlm", {name: setting[name] for name in ("directions", "step")})
    assert torch.allclose(built.sensitivity(view)[0], tensors[f"{case}.scores"], rtol=1e-3)
    index = built.reduce(PROJECTOR, view, setting["count"], {}).index[0]
    assert index.tolist() == sorted(tensors[f"{case}.order"].tolist())


def test_zoo_prune_multiplies_sensitivity_and_distance(generator):
    project = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 7))
    features = 2 * torch.randn(1, 12, 5, generator=generator)
    view = projected(features, project)
    method = registry.build("zoo-prune", "vlm")
    index = method.reduce(PROJECTOR, view, 5, {}).index[0]
    score = sensitivity(view, 64)[0]
    score = (score - score.min()) / (score.max() - score.min())
    unit = nn.functional.normalize(view.hidden[0], dim=1)
    picks = [int(score.argmax())]
    while len(picks) < 5:
        worth = score * (1 - (unit @ unit[picks].T).amax(1))
        picks.append(int(worth.index_fill(0, torch.tensor(picks), -1).argmax()))
    assert index.tolist() == sorted(picks)


def test_zoo_prune_on_a_linear_projector_is_diversity_alone(generator):
    project = nn.Linear(5, 7)
    features = torch.randn(1, 12, 5, generator=generator)
    view = projected(features, project)
    score = sensitivity(view)
    assert torch.allclose(score, score[:, :1].expand_as(score), rtol=1e-3)
    index = registry.build("zoo-prune", "vlm").reduce(PROJECTOR, view, 4, {}).index[0]
    unit, picks = nn.functional.normalize(view.hidden[0], dim=1), [0]
    while len(picks) < 4:
        near = (unit @ unit[picks].T).amax(1)
        picks.append(int(near.index_fill(0, torch.tensor(picks), 2).argmin()))
    assert index.tolist() == sorted(picks)
