"""Vision-language models as subjects: their decoders calibrated on prompts with images."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from tests.llm_weights.test_contract import _driver
from tests.vlm import tiny
from tprune.errors import UserError
from tprune.methods.weights import WeightBudget
from tprune.models.blocks import find_decoder
from tprune.models.calibrate import Stream
from tprune.models.feed import Prompts
from tprune.models.gradients import gradient_norms
from tprune.models.prompts import noise_prompts
from tprune.models.standing_in import answering
from tprune.models.subject import Subject
from tprune.pipelines import prune_weights, question_weights
from tprune.pipelines.journal import Journal
from tprune.pipelines.run import execute
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe, Stage, read

QUIET = Progress(quiet=True)
MODELS = [name for name in tiny.KINDS | tiny.MORE if name != "qwen3-vl"]
LENGTHS = (12, 7, 9)


def prompts(model):
    """Three prompts of different lengths, each with an image of its own."""
    inputs = [noise_prompts(model, 1, seed, behind=behind) for seed, behind in enumerate(LENGTHS)]
    return Prompts(inputs, model.config.image_token_id)


@pytest.mark.parametrize("name", MODELS)
def test_prompts_sent_through_block_by_block_end_where_the_decoder_ends(name):
    model = tiny.tiny(name)
    decoder, feed = find_decoder(model), prompts(model)
    stream = Stream(decoder, feed, batch_size=4)
    for index in range(len(decoder.blocks)):
        stream.advance(index)
    for place, inputs in enumerate(feed.inputs):
        hidden = stream.hidden[place : place + 1, : feed.lengths[place]]
        with torch.no_grad():
            expected = model(**inputs, use_cache=False).logits
            with answering(decoder, hidden):
                assert torch.allclose(model(**inputs, use_cache=False).logits, expected, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_what_blocks_of_many_prompts_are_called_with_is_kept_in_little_room(name):
    model = tiny.tiny(name)
    decoder, feed = find_decoder(model), prompts(model)
    stream = Stream(decoder, feed, batch_size=4)
    for place in range(len(feed)):
        alone = Stream(decoder, feed[place : place + 1], batch_size=4)
        for index in range(len(decoder.blocks)):
            kept, given = stream.arguments(index, 1, place), alone.arguments(index, 1, 0)
            assert_close(kept, given, rtol=0, atol=0)
    for kept in stream._arguments.values():
        assert not any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in kept[1].values())
    cosines = {kept[1]["position_embeddings"][0].data_ptr() for kept in stream._arguments.values()}
    assert len(cosines) < len(feed)


def test_statistics_are_over_the_tokens_of_prompts_and_none_of_padding():
    model = tiny.tiny("llava")
    decoder, feed = find_decoder(model), prompts(model)
    found = Stream(decoder, feed, batch_size=4).gather(0, ("norm", "gram"))
    seen = {}
    first = decoder.blocks[0].mlp.down_proj
    hook = first.register_forward_pre_hook(lambda module, given: seen.setdefault("x", []).append(given[0]))
    with torch.no_grad():
        for inputs in feed.inputs:
            model(**inputs, use_cache=False)
    hook.remove()
    x = torch.cat([part.flatten(0, 1) for part in seen["x"]])
    inputs = found[next(name for name in found if name.endswith("down_proj"))]
    assert (inputs.tokens, inputs.sequences) == (sum(feed.lengths), 3)
    assert torch.allclose(inputs.result()["norm"], x.norm(dim=0), rtol=1e-4)
    assert torch.allclose(inputs.result()["gram"], 2 / 3 * x.T @ x, rtol=1e-3, atol=1e-4)


def test_what_shows_images_is_told_from_text():
    feed = prompts(tiny.tiny("llava"))
    assert [int(feed.visual(slice(place, place + 1)).sum()) for place in range(3)] == [16, 16, 16]
    assert [len(feed[1:]), feed.shape] == [2, (3, max(feed.lengths))]


def test_gradients_are_of_the_text_s_tokens_alone():
    model = tiny.tiny("llava")
    decoder, feed = find_decoder(model), prompts(model)
    name = decoder.block_name(0) + ".mlp.down_proj.weight"
    found = gradient_norms(decoder, feed[:1])[name]
    weight = decoder.blocks[0].mlp.down_proj.weight
    inputs = feed.inputs[0]
    weight.requires_grad_(True)
    logits, ids = model(**inputs, use_cache=False).logits[0, :-1], inputs["input_ids"][0, 1:]
    text = ids != tiny.IMAGE
    loss = torch.nn.functional.cross_entropy(logits[text], ids[text])
    (expected,) = torch.autograd.grad(loss, weight)
    weight.requires_grad_(False)
    assert torch.allclose(found, expected.abs(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("method", ["sparsegpt", "alps", "dass", "gblm", "wanda-pp"])
def test_methods_of_all_kinds_prune_the_decoder_on_prompts_and_leave_the_tower(method):
    model = copy.deepcopy(tiny.tiny("llava-next"))
    tower = {name: value.clone() for name, value in model.model.vision_tower.state_dict().items()}
    driver = _driver(method)
    decoder, feed = driver.decoder(model), prompts(model)
    handle = prune_weights.prune(driver, decoder, WeightBudget(0.5), feed, Journal(None, "test"))
    assert handle.achieved().value == 0.5
    for name, value in model.model.vision_tower.state_dict().items():
        assert torch.equal(value, tower[name])


def test_digits_llava_is_pruned_on_scenes_measured_by_answers_and_made_again(tmp_path):
    stage = Stage("llm-weights", "wanda", sparsity=0.5)
    asked = Recipe(ModelSource("digits-llava"), (stage,), limit=2, calibration=2, batch_size=1)
    report = execute(asked, QUIET, out=str(tmp_path / "one"))
    assert {"accuracy", "accuracy_by_kind", "agreement"} <= report["pruned"].keys()
    assert (tmp_path / "one" / "processor_config.json").exists()
    execute(read(tmp_path / "one" / "recipe.yaml"), QUIET, out=str(tmp_path / "two"), evaluate=False)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_text_is_what_whole_models_and_text_itself_ask_for(tmp_path):
    subject = Subject(tiny.tiny("llava"), SimpleNamespace(tokenizer=None, image_processor=None), None)

    def admits(method="wanda", **more):
        asked = Recipe(ModelSource("m"), (Stage("llm-weights", method, sparsity=0.5),), **more)
        return question_weights.admits(subject, asked)

    (tmp_path / "questions.jsonl").write_text("")
    assert admits()
    assert admits("armor")
    assert admits(data=str(tmp_path))
    assert not admits("shortgpt")
    assert not admits(data=str(tmp_path / "questions.jsonl"))
    assert not admits(max_memory="1GB")
    subject.processor = SimpleNamespace(tokenizer=None)
    assert not admits()


def test_a_length_of_text_is_refused_where_prompts_are_what_is_read():
    stage = Stage("llm-weights", "wanda", sparsity=0.5)
    with pytest.raises(UserError, match="--length 16: digits-llava is calibrated on questions about images"):
        execute(Recipe(ModelSource("digits-llava"), (stage,), length=16), QUIET)
