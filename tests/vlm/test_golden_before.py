"""Methods that choose before the decoder against the authors' own code (see tests/golden/vlm/*.json)."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tprune
from tests.golden_values import golden
from tests.vlm.tiny import IMAGE, TEXT, one_row, tiny
from tprune.core.budget import PROJECTOR, Site
from tprune.methods import registry
from tprune.methods.attention import Attention
from tprune.methods.token_view import TokenView
from tprune.methods.tokens import Shape
from tprune.methods.vlm.mmtok import keywords
from tprune.models.prompts import noise_prompts


def cases(name):
    """The cases of a golden file, by name."""
    return golden("vlm", name)[1]["settings"]["cases"]


def tower(hidden, attention, prefix=1):
    """What a vision tower with class token shows of its projected block."""
    prunable = torch.ones(hidden.shape[:2], dtype=torch.bool)
    prunable[:, :prefix] = False
    return TokenView(hidden, prunable, prefix=prefix, has_cls=prefix > 0, depth=24, attention=attention)


def image(hidden, encoder=None, **more):
    """Image tokens at the projector, one per patch."""
    everything = torch.ones(hidden.shape[:2], dtype=torch.bool)
    return TokenView(hidden, everything, real=everything, encoder=encoder, pool=lambda x: x, **more)


@pytest.mark.parametrize("case", cases("visionzip"))
def test_visionzip_projects_what_the_authors_project(case):
    tensors, told = golden("vlm", "visionzip")
    setting, hidden, key = told["settings"]["cases"][case], tensors["hidden"], tensors["metric"].unsqueeze(1)
    rows = tensors["cls"].expand(-1, -1, hidden.shape[1], -1)
    view = image(hidden, tower(hidden, Attention(key, key, key, 1.0, map=rows)))
    view.prunable = view.encoder.prunable
    view.prefix = 1
    view.pool = lambda x: x
    count = setting["dominant"] + setting["contextual"]
    method = registry.build("visionzip", "vlm", {"contextual": setting["contextual"] / count})
    reduction = method.reduce(PROJECTOR, view, count, {})
    assert torch.allclose(reduction.apply(hidden), tensors[case], atol=1e-6)


@pytest.mark.parametrize("case", cases("hiprune"))
def test_hiprune_keeps_the_authors_tokens(case):
    tensors, told = golden("vlm", "hiprune")
    setting, settings = told["settings"]["cases"][case], told["settings"]
    middle, deep = (
        tower(
            key.float().transpose(1, 2).flatten(2),
            Attention(query.float(), key.float(), key, settings["scale"]),
        )
        for query, key in zip(tensors["query"], tensors["key"], strict=True)
    )
    view = image(torch.zeros(2, 576, 3), deep, encoders={8: middle}, grid=tuple(settings["grid"]))
    method = registry.build("hiprune", "vlm", {"alpha": setting["alpha"]})
    index = method.reduce(PROJECTOR, view, setting["count"], {}).index
    assert torch.equal(torch.zeros(2, 576).scatter(1, index, 1), tensors[case].float())


def test_hiprunes_neighbours_stop_at_the_sides_where_rows_do_not_wrap():
    anchors = torch.zeros(1, 12, dtype=torch.bool)
    anchors[0, 4] = True
    wrapped, kept = (
        registry.build("hiprune", "vlm", {"wrap": wrap}).with_buffers(anchors, (3, 4)) for wrap in (1, 0)
    )
    assert wrapped[0].nonzero().flatten().tolist() == [0, 3, 4, 5, 8]
    assert kept[0].nonzero().flatten().tolist() == [0, 4, 5, 8]


@pytest.mark.parametrize("case", cases("holov"))
def test_holov_keeps_the_authors_tokens_in_their_order(case):
    """Where they append zero vectors, tokens take their places, all of theirs among them."""
    tensors, told = golden("vlm", "holov")
    setting, theirs = told["settings"]["cases"][case], tensors[case].long()
    row = torch.cat([torch.zeros(2, 1), tensors[setting["attention"]]], 1)
    rows = row[:, None, None].expand(-1, 1, 51, -1)
    key = torch.zeros(2, 1, 51, 4)
    view = image(tensors["tokens"], tower(torch.zeros(2, 51, 4), Attention(key, key, key, 1.0, map=rows)))
    method = registry.build("holov", "vlm", {"bands": setting["bands"], "order": "attention"})
    index = method.reduce(PROJECTOR, view, setting["count"], {}).index
    for ours, known, zeros in zip(index, theirs, setting["zeros"], strict=True):
        if zeros:
            assert set(known[known >= 0].tolist()) <= set(ours.tolist())
            assert len(set(ours.tolist())) == setting["count"]
        else:
            assert torch.equal(ours, known)
    ascending = registry.build("holov", "vlm", {"bands": setting["bands"]})
    assert torch.equal(ascending.reduce(PROJECTOR, view, setting["count"], {}).index, index.sort(1).values)


def text(hidden):
    """A question's embeddings, the same for every image."""
    real = torch.ones(hidden.shape[:2], dtype=torch.bool)
    words = TokenView(hidden, ~real, real=real)
    words.signals["reworded"] = lambda: lambda rewrite: words
    return words


@pytest.mark.parametrize("case", cases("mmtok"))
def test_mmtok_keeps_the_authors_tokens(case):
    tensors, told = golden("vlm", "mmtok")
    setting = dict(told["settings"]["cases"][case])
    count, hidden = setting.pop("count"), tensors["projected"][None]
    patches = torch.cat([torch.zeros(1, 1, 6), tensors["patches"][None]], 1)
    view = image(hidden, tower(patches, None), signals={"text": lambda: text(tensors["text"][None])})
    index = registry.build("mmtok", "vlm", setting).reduce(PROJECTOR, view, count, {}).index
    assert torch.equal(index[0], tensors[case])


def test_mmtoks_keywords_are_the_authors():
    for question, words in golden("vlm", "mmtok")[1]["settings"]["keywords"].items():
        assert keywords(question) == words


@pytest.mark.parametrize("case", cases("script"))
def test_script_keeps_the_authors_tokens(case):
    tensors, told = golden("vlm", "script")
    setting = told["settings"]["cases"][case]
    segments = tensors[f"text{setting['segments']}"].expand(2, -1, -1)
    view = image(tensors["projected"], signals={"clip": lambda: (tensors["image"], text(segments))})
    index = registry.build("script", "vlm").reduce(PROJECTOR, view, setting["count"], {}).index
    assert torch.equal(torch.zeros(2, 40).scatter(1, index, 1), tensors[case].float())


@pytest.mark.parametrize("case", cases("flowcut"))
def test_flowcut_leaves_the_authors_patches_on_their_way_through_the_tower(case):
    """A batch here, one image at a time there; in each the numbers at the blocks are its own."""
    tensors, told = golden("vlm", "flowcut")
    config = CLIPVisionConfig(**told["settings"]["config"])
    tokens, target = 36, told["settings"]["cases"][case]["target"]
    with torch.random.fork_rng():
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=config, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE)
        ).eval()
    tower, flat = model.model.vision_tower, tensors["weights"].float()
    for _, weight in sorted(tower.state_dict().items()):
        if weight.is_floating_point():
            weight.copy_(flat[: weight.numel()].view_as(weight))
            flat = flat[weight.numel() :]
    assert not len(flat)
    projected = model.model.multi_modal_projector(tensors[f"{case}.features"])
    ids = torch.tensor([5, *[IMAGE] * tokens, 6, 7]).repeat(3, 1)
    entered = {}
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: entered.update(x=args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad(), tprune.prune(model, "vlm/flowcut", ratio=target / tokens) as handle:
        model(input_ids=ids, pixel_values=tensors["pixels"].float(), attention_mask=torch.ones_like(ids))
        kept = handle.driver.tally.owner[:, 1 : tokens + 1] >= 0
    assert torch.equal(kept.nonzero()[:, 1].view(3, target), tensors[f"{case}.kept"])
    assert torch.allclose(entered["x"][:, 1 : target + 1], projected, atol=1e-4)


@pytest.mark.parametrize("target", golden("vlm", "flowcut")[1]["settings"]["inside"]["targets"])
def test_flowcut_keeps_the_authors_tokens_inside_the_decoder(target):
    tensors, told = golden("vlm", "flowcut")
    first, end = told["settings"]["inside"]["image"]
    query, key, value = (tensors[f"inside.{name}"].float() for name in ("query", "key", "value"))
    there = torch.zeros(1, 40, dtype=torch.bool)
    there[:, first:end] = True
    attention = Attention(query, key, value, 6**-0.5, causal=True)
    view = TokenView(torch.zeros(1, 40, 4), there, real=torch.ones_like(there), attention=attention)
    method = registry.build("flowcut", "vlm", {"late": 0.4})
    index = method.reduce(Site(2), view, target, {}).index[0]
    kept = index[(index >= first) & (index < end)] - first
    assert torch.equal(kept, tensors[f"inside.k{target}"])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llava-next", "qwen2-vl"])
def test_what_flowcut_leaves_inside_the_decoder_is_planned_and_decoded(kind):
    model, inputs = tiny(kind), noise_prompts(tiny(kind), 2, 0)
    dense = model(**inputs).logits
    with tprune.prune(model, "vlm/flowcut", late=0.4, keep=1.0):
        assert torch.equal(model(**inputs).logits, dense)
    ask = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with tprune.prune(model, "vlm/flowcut", ratio=0.5, late=0.4) as handle:
        together, told = model(**inputs).logits, model.generate(**inputs, **ask)
        entering = [row["tokens"] for row in handle.per_layer()]
        rows = [one_row(inputs, row) for row in range(2)]
        alone = torch.cat([model(**row).logits for row in rows])
        longer = torch.cat([model.generate(**row, **ask) for row in rows])
    assert torch.allclose(together, alone, atol=2e-4)
    assert torch.equal(told, longer)
    assert entering[0] > entering[1] == entering[2] == entering[3] == round(0.4 * entering[0])


@pytest.mark.parametrize("scale", golden("vlm", "m3")[1]["settings"]["scales"])
def test_m3_pools_as_the_authors_do(scale):
    tensors, _ = golden("vlm", "m3")
    features = tensors["features"]
    method = registry.build("m3", "vlm", {"tokens": scale})
    [stage] = method.stages(Shape(4, 576), None)
    reduction = method.reduce(PROJECTOR, image(features, grid=(24, 24)), stage.count, {})
    assert torch.allclose(reduction.apply(features), tensors[f"scale_{scale}"], atol=1e-6)
