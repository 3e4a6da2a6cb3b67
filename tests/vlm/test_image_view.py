"""What methods are shown at the projector is what the model computed, token by token."""

from dataclasses import dataclass

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

import tprune
from tests.vlm.tiny import KINDS, MORE, TOWER, tiny
from tprune.core.budget import PROJECTOR, Stage
from tprune.core.reduction import Reduction
from tprune.data.questions import built_in
from tprune.errors import UserError
from tprune.methods.vlm.random import Random
from tprune.models import load
from tprune.models.clip import Clip
from tprune.models.prompts import noise_prompts
from tprune.models.source import resolve
from tprune.models.subject import Subject
from tprune.models.vlm import anatomy
from tprune.pipelines.run import pipeline
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe
from tprune.recipe import Stage as RecipeStage


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class Looks(Random):
    """Keeps everything, and what it was shown."""

    reads = ("encoder", "projector")

    def encoder_blocks(self, depth):
        return (0, depth - 1)

    def stages(self, shape, knob):
        return [Stage(PROJECTOR, shape.tokens)]

    def reduce(self, site, view, count, memory):
        SEEN.append(view)
        return Reduction.identity(*view.prunable.shape)


class LooksAtCrops(Looks):
    unit = "crop"


SEEN = []


def views(model, inputs, by_crop, positions=None):
    """What a method is shown of these prompts."""
    SEEN.clear()
    stage = RecipeStage("vlm", "random", positions=positions)
    driver = pipeline(Recipe(ModelSource("in memory"), (stage,)), stage, Progress())
    driver.method = LooksAtCrops() if by_crop else Looks()
    with driver.apply(Subject(model, None, None), None):
        model(**inputs)
    return list(SEEN)


@pytest.mark.parametrize("by_crop", [True, False])
@pytest.mark.parametrize("kind", KINDS | MORE)
def test_features_are_what_the_projector_makes_the_tokens_of(kind, by_crop):
    model = tiny(kind)
    found = views(model, noise_prompts(model, 2, 0, images=2), by_crop)
    assert found
    for view in found:
        projected = view.signal("projector")(view.signal("features"))
        newline = (
            view.pool(
                torch.ones(view.encoder.hidden.shape[0], view.encoder.hidden.shape[1] - view.encoder.prefix)
            )
            == 0
        )
        same = view.prunable & ~newline
        assert same.any()
        assert torch.allclose(projected[same], view.hidden[same], atol=1e-5)
        assert newline.any() == (kind in ("llava-next", "llava-onevision") and not by_crop)


@pytest.mark.parametrize("kind", [kind for kind in KINDS | MORE if not kind.startswith("qwen")])
def test_the_attention_of_a_block_is_what_eager_attention_computes(kind):
    model = tiny(kind)
    inputs = noise_prompts(model, 1, 1)
    [view, *_] = views(model, inputs, by_crop=False)
    parts = anatomy(model)
    seen = {}

    def keep(block):
        def hook(module, args, output):
            seen.setdefault(block, []).append(output[1])

        return hook

    depth = len(parts.blocks)
    hooks = [
        next(
            part for part in parts.blocks[block].modules() if type(part).__name__.endswith("Attention")
        ).register_forward_hook(keep(block))
        for block in range(depth)
    ]
    model.set_attn_implementation({"vision_config": "eager"})
    model(**inputs)
    model.set_attn_implementation({"vision_config": "sdpa"})
    for hook in hooks:
        hook.remove()
    assert set(view.encoders) == {0, depth - 1, parts.projected}
    for block, expected in seen.items():
        if block in view.encoders:
            assert torch.allclose(view.encoders[block].attention.rows(), expected[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2-vl", "qwen2.5-vl"])
def test_a_block_rebuilt_from_its_view_gives_its_own_output(kind):
    """Each window by itself, patches in the order of their pixels: the tower's own order is a permutation of it."""
    model = tiny(kind)
    inputs = noise_prompts(model, 1, 1)
    block, entering = anatomy(model).blocks[-1], []
    hook = block.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    [view] = views(model, inputs, by_crop=False)
    hook.remove()
    last = view.encoders[anatomy(model).projected]
    read = block.attn.proj((last.attention.rows() @ last.attention.value).transpose(1, 2).flatten(2)[0])
    between = entering[0].unsqueeze(1) + read  # every patch as it came, with what every patch read
    error = (between + block.mlp(block.norm2(between)) - last.hidden[0]).norm(dim=2)
    assert error.argmin(1).sort().values.tolist() == list(range(len(read)))
    assert error.amin(1).max() < 1e-3
    assert (last.attention.bias is not None) == (kind == "qwen2.5-vl")


def test_text_is_what_stands_behind_the_last_image():
    model = tiny("llava")
    inputs = noise_prompts(model, 2, 0, images=2)
    [view] = views(model, inputs, by_crop=False)
    text = view.signal("text")
    assert torch.equal(text.signal("ids"), inputs["input_ids"][[0, 0, 1, 1], -12:])
    assert torch.equal(text.hidden, model.get_input_embeddings()(text.signal("ids")))
    assert text.real.all()


@pytest.mark.parametrize("kind", KINDS | MORE)
def test_patches_are_the_pixels_of_each_of_the_towers_patches(kind):
    model = tiny(kind)
    inputs = noise_prompts(model, 2, 0)
    for view in views(model, inputs, by_crop=True):
        patches = view.signal("patches")
        assert patches.shape[:2] == (
            view.encoder.hidden.shape[0],
            view.encoder.hidden.shape[1] - view.encoder.prefix,
        )
        assert 0 <= patches.min() <= patches.max() <= 1
    if kind == "llava":
        expected = inputs["pixel_values"][0, :, 8:16, 24:32].flatten(1)
        low, high = inputs["pixel_values"][0].aminmax()
        assert torch.allclose(patches[0, 7], (expected - low) / (high - low))


def test_the_thumbnail_is_the_first_crop_of_llava_next_and_the_last_tile_of_internvl():
    [view] = views(tiny("llava-next"), noise_prompts(tiny("llava-next"), 1, 0), by_crop=False)
    assert view.signal("thumbnail")[0].nonzero().flatten().tolist() == list(range(16))
    [view] = views(tiny("internvl"), noise_prompts(tiny("internvl"), 1, 0), by_crop=False)
    assert view.signal("thumbnail").all()


def test_text_and_patches_meet_in_the_space_of_the_clip_that_is_given():
    config = {
        "projection_dim": 5,
        "text_config": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1},
    }
    config["text_config"] |= {
        "num_attention_heads": 2,
        "vocab_size": 30,
        "max_position_embeddings": 6,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng():
        clip = CLIPModel(CLIPConfig(vision_config=TOWER, **config)).eval().requires_grad_(False)

    def tokenizer(row):
        return {"input_ids": [1, *(3 + ord(letter) % 20 for letter in row), 2]}

    beside = Clip(clip, tokenizer)
    text = beside.text(["abc", "abcdefgh"])
    assert text.real.tolist() == [[True, False], [True, True]]
    alone = clip.get_text_features(
        input_ids=torch.tensor([tokenizer("abc")["input_ids"] + [0]]),
        attention_mask=torch.tensor([[1, 1, 1, 1, 1, 0]]),
    ).pooler_output
    assert torch.allclose(text.hidden[0, 0], alone[0], atol=1e-6)
    patches = torch.randn(1, 4, 24, generator=torch.Generator().manual_seed(0))
    expected = clip.visual_projection(clip.vision_model.post_layernorm(patches))
    assert torch.allclose(beside.image(patches), expected)


def test_a_clip_that_is_not_there_is_named():
    with pytest.raises(UserError, match="--set clip=/nowhere"):
        tprune.prune(tiny("llava"), "vlm/script", keep=0.5, clip="/nowhere")


def test_text_in_other_words_is_what_the_tokenizer_makes_of_them():
    source = resolve(ModelSource("digits-llava"), "vlm")
    subject = load.load(source, "vlm", device="cpu", dtype="float32", seed=0)
    questions = built_in(2)
    asked = [f"<image> {item.prompt}" for item in questions.items]
    images = [questions.open(place) for place in range(2)]
    inputs = dict(subject.processor(images=images, text=asked, padding=True, return_tensors="pt"))
    SEEN.clear()
    stage = RecipeStage("vlm", "random")
    driver = pipeline(Recipe(ModelSource("in memory"), (stage,)), stage, Progress())
    driver.method = Looks()
    with driver.apply(Subject(subject.model, subject.processor, None), None):
        subject.model(**inputs)
    text, heard = SEEN[0].signal("text"), []
    found = text.signal("reworded")(lambda told: heard.append(told) or " ".join(told.split()[:2]))
    assert [told.split() for told in heard] == [item.prompt.split() for item in questions.items]
    tokenizer = subject.processor.tokenizer
    for row, told in enumerate(heard):
        ids = tokenizer(" ".join(told.split()[:2]), add_special_tokens=False)["input_ids"]
        assert found.signal("ids")[row, found.real[row]].tolist() == ids
        assert torch.equal(
            found.hidden[row, found.real[row]], subject.model.get_input_embeddings()(torch.tensor(ids))
        )
