"""The built-in models: read by stock loaders, as accurate as recorded, trained again by one command."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tprune import zoo
from tprune.commands.zoo import command
from tprune.data import scenes
from tprune.models.load import load
from tprune.models.source import resolve
from tprune.pipelines.text_task import TextTask
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe
from tprune.zoo import digits_llava
from tprune.zoo.train import new_learner

SCENES = 200


def within_noise(measured: float, recorded: float, n: int) -> bool:
    """Whether a share of `n` is within four standard deviations of a recorded share, and at least one sample."""
    return abs(measured - recorded) <= max(4 * np.sqrt(recorded * (1 - recorded) / n), 1 / n)


def test_importing_the_zoo_does_not_import_torch():
    code = "import sys, tprune.zoo, tprune.commands.zoo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_shipped_model_is_a_few_megabytes_of_safetensors(name):
    assert (zoo.path(name) / "model.safetensors").stat().st_size < 6.5e6
    assert not list(zoo.path(name).glob("*.bin"))


def test_stock_timm_reads_digits_vit_at_its_recorded_accuracy():
    import timm
    from timm.data import create_transform, resolve_model_data_config

    model = timm.create_model(f"local-dir:{zoo.path('digits-vit')}", pretrained=True).eval()
    assert model.patch_embed.num_patches >= 144
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    sample = scenes.evaluation_scenes("digits-vit", SCENES)
    with torch.inference_mode():
        guess = model(torch.stack([transform(scene.image) for scene in sample])).argmax(-1)
    right = (guess == torch.tensor([scene.label for scene in sample])).float().mean().item()
    assert within_noise(right, zoo.facts("digits-vit")["accuracy"], SCENES)


@pytest.fixture(scope="module")
def llava():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = zoo.path("digits-llava")
    return AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()


@torch.inference_mode()
def test_stock_transformers_reads_digits_llava_at_its_recorded_accuracy(llava):
    processor, model = llava
    sample = scenes.evaluation_scenes("digits-llava", SCENES)
    inputs = processor(
        images=[q.image for q in sample],
        text=[f"<image> {q.prompt}" for q in sample],
        padding=True,
        return_tensors="pt",
    )
    assert ((inputs["input_ids"] == model.config.image_token_id).sum(-1) == 144).all()
    guess = model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1)
    right = np.array(processor.tokenizer.convert_ids_to_tokens(guess)) == [q.answer for q in sample]
    recorded = zoo.facts("digits-llava")
    assert within_noise(right.mean(), recorded["accuracy"], SCENES)
    for kind, accuracy in recorded["accuracy_by_kind"].items():
        chosen = right[[q.kind == kind for q in sample]]
        assert within_noise(chosen.mean(), accuracy, len(chosen)), kind


@torch.inference_mode()
def test_digits_llava_generates_one_word_and_stops(llava):
    processor, model = llava
    question = scenes.evaluation_scenes("digits-llava", 1)[0]
    inputs = processor(images=question.image, text=f"<image> {question.prompt}", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert len(output) == 2
    assert output[1] == processor.tokenizer.eos_token_id


def test_a_chat_is_written_as_the_plain_prompt(llava):
    processor, _ = llava
    content = [{"type": "image"}, {"type": "text", "text": "where is 7 ?"}]
    assert processor.apply_chat_template([{"role": "user", "content": content}]) == "<image> where is 7 ?"


def test_packed_questions_are_answered_as_if_each_stood_alone(llava):
    from tprune.zoo import digits_llava

    _, model = llava
    pixels, *_, tokens, _targets, _kept = digits_llava._example(5, 0)
    inputs = digits_llava.normalised(torch.from_numpy(pixels)[None])
    learner = digits_llava.DigitsLlava()
    learner.model = model
    with torch.inference_mode():
        visual = model.model.multi_modal_projector(learner.tower_features(inputs)[0])
        packed = learner.packed_hidden(visual, torch.from_numpy(tokens)[None])[0]
        for slot in range(3):
            words = torch.from_numpy(tokens).view(digits_llava.QUESTIONS, -1)[slot]
            image = torch.full((144,), digits_llava.ID["<image>"])
            alone = torch.cat([torch.tensor([digits_llava.ID["<bos>"]]), image, words[:4]])[None]
            expected = model(input_ids=alone, pixel_values=inputs).logits[0, -4:]
            found = model.lm_head(packed[slot * digits_llava.SLOT :][:4])
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_the_head_on_minilm_tells_topics_apart_at_its_recorded_accuracy():
    source = resolve(ModelSource("minilm-topics"), "llm-context")
    subject = load(source, "llm-context", device="cpu", dtype="float32", seed=0)
    recipe = Recipe(ModelSource("minilm-topics"), (), limit=28)
    found = TextTask(recipe, subject, Progress(quiet=True)).evaluate(subject).metrics["accuracy"]
    assert within_noise(found, zoo.facts("minilm-topics")["accuracy"], 28)
    assert type(subject.model).__name__ == "BertForSequenceClassification"


def test_list_names_every_model_with_its_accuracy():
    result = CliRunner().invoke(command, ["list", "--json"])
    models = json.loads(result.output)["models"]
    assert [model["name"] for model in models] == list(zoo.NAMES)
    assert all(0.5 < model["accuracy"] <= 1 for model in models)


def test_the_same_seed_trains_the_same_weights_and_nothing_is_overwritten(tmp_path):
    options = ["--steps", "3", "--workers", "1", "--scenes", "4"]
    for out in ("one", "two"):
        result = CliRunner().invoke(command, ["train", "digits-vit", "--out", str(tmp_path / out), *options])
        assert result.exit_code == 0, result.output
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not list(tmp_path.glob("*.training"))
    refused = CliRunner().invoke(command, ["train", "digits-vit", "--out", str(tmp_path / "one"), *options])
    assert "exists" in str(refused.exception)


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    from tprune.zoo import train

    train.train("digits-vit", tmp_path / "whole", 3, 1, 1, 4)
    step = train._Reporter.__call__

    def interrupted(self, *arguments):
        step(self, *arguments)
        if self.number == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(train._Reporter, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train("digits-vit", tmp_path / "broken", 3, 1, 1, 4)
    monkeypatch.undo()
    train.train("digits-vit", tmp_path / "broken", 3, 1, 1, 4)
    whole, broken = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "broken"))
    assert all(torch.equal(whole[key], broken[key]) for key in whole)


@torch.no_grad()
def test_thinned_images_are_trained_on_as_if_the_other_tokens_were_not_there():
    learner = new_learner("digits-llava", 0).eval()
    generator = torch.Generator().manual_seed(0)
    side = digits_llava.SIDE**2
    length = digits_llava.QUESTIONS * digits_llava.SLOT
    visual = torch.randn(2, side, digits_llava.WIDTH, generator=generator)
    tokens = torch.randint(5, 20, (2, length), generator=generator)
    kept = torch.rand(2, side, generator=generator) < 0.4
    shown = learner.packed_hidden(visual, tokens, kept)
    inner = learner.model.model
    embed = inner.get_input_embeddings()
    mask, positions = digits_llava._packing()
    for row in range(2):
        left = torch.cat([torch.tensor([True]), kept[row], torch.ones(length, dtype=torch.bool)])
        whole = torch.cat(
            [embed(torch.full((1, 1), 1)), visual[row : row + 1], embed(tokens[row : row + 1])], 1
        )
        alone = inner.language_model(
            inputs_embeds=whole[:, left],
            attention_mask=mask[:, :, left][..., left],
            position_ids=positions[:, left],
            use_cache=False,
        ).last_hidden_state[:, -length:]
        assert torch.allclose(shown[row : row + 1], alone, atol=1e-5)
