"""`tprune vlm` from questions to artifact, on the built-in model."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import tprune
from tprune.cli import command
from tprune.data import questions
from tprune.errors import UserError
from tprune.evaluate.cost import flops
from tprune.models import load
from tprune.models.prompts import noise_prompts
from tprune.models.source import resolve
from tprune.pipelines.question_task import QuestionTask, prefill
from tprune.pipelines.run import execute, pipeline
from tprune.pipelines.vlm_answers import question_inputs, told
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe, Stage, read


def recipe(method, **changes):
    stage = Stage("vlm", method, keep=0.5)
    return Recipe(ModelSource("digits-llava"), (stage,), limit=12, batch_size=5, **changes)


@pytest.mark.parametrize("method", ["fastv", "divprune"])
def test_an_artifact_gives_the_same_outputs_and_its_recipe_the_same_bytes(method, tmp_path):
    report = execute(recipe(method), Progress(), out=tmp_path / "one")
    by_kind = report["pruned"]["accuracy_by_kind"]
    assert set(by_kind) == {"what", "where", "count"}
    assert report["pruned"]["accuracy"] == pytest.approx(sum(by_kind.values()) / 3)
    assert report["dense"]["agreement"] == 1
    assert report["pruned"]["flops"] < report["dense"]["flops"]
    assert len(report["per_layer"]) == 12
    budget = report["budget"]
    assert budget["achieved"] == pytest.approx(budget["tokens_entering_mean"] / 144)
    assert (budget["tokens_leaving_mean"] < budget["tokens_entering_mean"]) == (method == "fastv")
    assert budget["kept_per"] == {"fastv": "prompt", "divprune": "image"}[method]
    assert budget["positions"] == {"fastv": "original", "divprune": "compact"}[method]

    model = tprune.load(tmp_path / "one")
    inputs = noise_prompts(model, 2, 0)
    with torch.no_grad():
        again = model(**inputs, logits_to_keep=1).logits
        model.tprune_handle.remove()
        dense = model(**inputs, logits_to_keep=1).logits
        with tprune.prune(model, f"vlm/{method}", keep=0.5):
            assert torch.equal(model(**inputs, logits_to_keep=1).logits, again)
    assert not torch.equal(dense, again)

    execute(read(tmp_path / "one" / "recipe.yaml"), Progress(), out=tmp_path / "two", evaluate=False)
    for name in ("model.safetensors", "probe.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_what_is_reported_of_tokens_and_flops_is_that_of_the_questions_where_these_decide():
    asked = replace(recipe("recoverable"), stages=(Stage("vlm", "recoverable"),), limit=6, batch_size=6)
    report = execute(asked, Progress(quiet=True))
    source = resolve(ModelSource("digits-llava"), "vlm")
    subject = load.load(source, "vlm", device="cpu", dtype="float32", seed=0)
    inputs = QuestionTask(asked, subject, Progress(quiet=True)).inputs(subject, range(6))
    noise = noise_prompts(subject.model, 6, 0)
    with torch.no_grad(), tprune.prune(subject.model, "recoverable") as handle:
        counted = flops(lambda: prefill(subject, inputs))
        expected = handle.achieved().value
        prefill(subject, noise)
        assert abs(handle.achieved().value - expected) > 0.05
    assert report["pruned"]["flops"] == counted
    assert report["budget"]["achieved"] == pytest.approx(expected)


def test_by_reference_the_base_is_named_and_not_copied(tmp_path):
    execute(recipe("dart"), Progress(), out=tmp_path / "one", evaluate=False, by_reference=True)
    assert not (tmp_path / "one" / "model.safetensors").exists()
    assert tprune.load(tmp_path / "one").tprune_handle.achieved().value == pytest.approx(0.5, abs=0.01)


def test_the_command_prints_one_json_object():
    arguments = ["vlm", "--method", "random", "--keep", "0.4", "--limit", "6", "--json", "digits-llava"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["family"] == "vlm"
    assert set(report["dense"]) == set(report["pruned"])
    assert abs(report["budget"]["achieved"] - 0.4) < 0.01


def test_the_table_says_what_keep_counts_and_which_positions_are_left():
    arguments = ["vlm", "--method", "fastervlm", "--keep", "0.4", "--limit", "2", "--positions", "original"]
    result = CliRunner().invoke(command, [*arguments, "digits-llava"])
    assert result.exit_code == 0, result.output
    assert "kept per: crop" in result.stdout
    assert "positions: original" in result.stdout


@pytest.mark.parametrize("method", ["fastervlm", "dart"])
def test_bench_times_the_parts_of_a_prompt_apart_and_leaves_the_model_as_it_was(method):
    stage = Stage("vlm", method, keep=0.5)
    driver = pipeline(Recipe(ModelSource("digits-llava"), (stage,), batch_size=2), stage, Progress())
    subject = driver.load()
    driver.probe(subject)
    before = {name: set(vars(module)) for name, module in subject.model.named_modules()}
    found = driver.bench(subject, 2)
    assert {name: set(vars(module)) for name, module in subject.model.named_modules()} == before
    times = found["times"]
    assert list(times)[:2] == ["dense", "pruned"]
    assert set(times) - {"dense", "pruned"} == {
        *(f"{part}_{name}" for part in ("encoder", "prefill", "decode") for name in ("dense", "pruned")),
        "scoring",
        "select 64 of 576",
    }
    assert len(times["dense"]) == len(times["encoder_pruned"]) == len(times["scoring"]) == 2
    assert found["flops"]["pruned"] < found["flops"]["dense"]


def folder(tmp_path, lines, image="a.png"):
    Image.new("RGB", (40, 30), "white").save(tmp_path / image)
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    return str(tmp_path)


GOOD = json.dumps({"image": "a.png", "prompt": "how many digits are there ?", "answer": "2", "kind": "count"})


def test_questions_of_ones_own_are_read_in_their_order(tmp_path):
    other = json.dumps({"image": "a.png", "prompt": "where is 4 ?", "answer": "top-left"})
    found = questions.read(folder(tmp_path, [GOOD, "", other, GOOD]), 2)
    assert [item.answer for item in found.items] == ["2", "top-left"]
    assert [item.kind for item in found.items] == ["count", None]
    assert found.open(1).size == (40, 30)
    assert found.protocol["samples"] == 2
    assert found.chance() == 1
    report = execute(
        Recipe(ModelSource("digits-llava"), (Stage("vlm", "fastervlm", keep=0.5),), data=str(tmp_path)),
        Progress(),
    )
    assert set(report["pruned"]["accuracy_by_kind"]) == {"count", "other"}


@pytest.mark.parametrize(
    ("lines", "clue"),
    [
        ([], "no questions"),
        (["not json"], "line 1"),
        ([GOOD, '{"image": "a.png", "prompt": "?"}'], "line 2"),
        (['{"image": "b.png", "prompt": "?", "answer": "x"}'], "no such file"),
    ],
)
def test_bad_questions_are_named(tmp_path, lines, clue):
    with pytest.raises(UserError, match=clue):
        questions.read(folder(tmp_path, lines), 10)


def test_missing_folders_and_unreadable_images_are_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        questions.read(str(tmp_path / "nowhere"), 10)
    with pytest.raises(UserError, match=r"cannot read questions\.jsonl"):
        questions.read(str(tmp_path), 10)
    source = folder(tmp_path, [GOOD])
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(UserError, match="not a readable image"):
        questions.read(source, 10).open(0)


def test_answers_of_several_tokens_are_generated(tmp_path):
    line = json.dumps({"image": "a.png", "prompt": "where is 4 ?", "answer": "top-left 2"})
    report = execute(
        Recipe(
            ModelSource("digits-llava"),
            (Stage("vlm", "fastv", keep=0.5),),
            data=folder(tmp_path, [line]),
        ),
        Progress(),
    )
    assert report["pruned"]["accuracy"] == 0


def test_a_shorter_question_beside_a_longer_one_stands_where_it_does_alone():
    driver = pipeline(recipe("dart"), recipe("dart").stages[0], Progress())
    subject = driver.load()
    seen = []
    decoder = subject.model.model.language_model
    decoder.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["position_ids"]), with_kwargs=True
    )
    images = [Image.new("RGB", (96, 96))] * 2
    inputs = question_inputs(subject, images, ["where is 4 ?", "what digit is in the top left of it ?"])
    padding = int((inputs["attention_mask"][0] == 0).sum())
    told(subject, inputs, 1)
    assert padding > 0
    assert torch.equal(seen[0][0, padding:], seen[0][1, : seen[0].shape[1] - padding])
