"""SHRP: heads as experts of a router, of which the most used are left."""

import json
import subprocess
import sys

import pytest
import torch

import tprune
from tests import encoders
from tests.decoders import decoder
from tests.encoders import NAMES, encoder, outputs, texts
from tests.fits import StoppedError, stopping
from tests.llm_weights.test_command import SMALL, run
from tests.llm_weights.tiny import prune
from tprune import artifact
from tprune.core.routing import groups_of, top_of_groups
from tprune.core.weights import StructureEdit
from tprune.errors import BudgetError, UserError
from tprune.methods import registry
from tprune.models import shapes, units
from tprune.models.blocks import find_decoder
from tprune.models.routed import routed
from tprune.models.source import Source
from tprune.models.subject import Subject
from tprune.models.text_encoder import answers
from tprune.pipelines import prune_weights
from tprune.pipelines.learned_heads import Choosing
from tprune.pipelines.run import pipeline
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe, Stage

FEW = {"epochs": 1.0, "batch": 4, "lr": 1e-3}
COST = 4 * 32 * 8
TOTAL = 3 * (4 * 32 * 32 + 2 * 32 * 48)


def driver_of(path, sparsity=0.25, **settings):
    stage = Stage("llm-weights", "shrp", sparsity=sparsity, fit=str(path), set=FEW | settings)
    recipe = Recipe(ModelSource("tiny"), (stage,), data=str(path))
    return pipeline(recipe, stage, Progress(quiet=True))


def subject_of(model):
    return Subject(model, encoders.tokenizer(), Source("tiny", "folder", "", "transformers"))


@pytest.fixture(scope="module")
def passages(tmp_path_factory):
    """Texts of five classes that one letter tells apart."""
    path = tmp_path_factory.mktemp("data") / "passages.json"
    rows = [
        {"text": "ab" * (place % 5 + 3) + "cdefg"[place % 5] * 9, "label": place % 5} for place in range(60)
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    encoder().save_pretrained(path)
    encoders.tokenizer().save_pretrained(path)
    return path


def test_one_expert_of_every_group_is_taken_and_its_softmax_is_the_group_s():
    groups = groups_of(12, 5)
    assert groups.sum(1).tolist() == [3, 2, 3, 2, 2]
    assert groups.sum(0).tolist() == [1] * 12
    two = groups_of(5, 2)
    logits = torch.tensor([[1.0, 3.0, 2.0, 7.0, 7.0], [0.0, 0.0, 0.0, 0.0, 1.0]])
    taken, soft = top_of_groups(logits, two)
    assert taken.tolist() == [[0, 1, 0, 1, 0], [1, 0, 0, 0, 1]]
    assert torch.allclose(soft[:, :3], logits[:, :3].softmax(-1))
    assert torch.allclose(soft[:, 3:], logits[:, 3:].softmax(-1))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_answers_as_the_routed_model_whose_routers_take_those_heads(name):
    model, given = encoder(name), texts()
    found = find_decoder(model)
    places = [units.site(found, index, "heads") for index in range(3)]
    dense = answers(model, given)
    with routed(model, places, [2, 1, 4], 0) as routing:
        assert torch.equal(answers(model, given), dense)  # nothing fades yet
        routing.settle(1.0, False)
        assert not torch.allclose(answers(model, given), dense)
        counted = [router.fresh.clone() for router in routing.routers]
        routing.settle(1.0, True)
        fixed = answers(model, given)
        stays = [router.stays() for router in routing.routers]
    for count, groups in zip(counted, (2, 1, 4), strict=True):
        assert count.sum() == groups * given["attention_mask"].sum()  # padding takes no head
    assert [int(one.sum()) for one in stays] == [2, 1, 4]
    edits = [StructureEdit(index, keep={"heads": one.nonzero().flatten()}) for index, one in enumerate(stays)]
    shapes.apply(found, edits)
    assert torch.allclose(answers(model, given), fixed, atol=1e-5)


def test_usage_is_counted_only_while_routing_is_full_and_free():
    model, given = encoder(), texts()
    found = find_decoder(model)
    places = [units.site(found, index, "heads") for index in range(3)]
    asked = registry.build("shrp", "llm-weights", {"grow": 0.25, "choose": 0.5}).routed
    with routed(model, places, [1, 1, 1], 0) as routing:
        fit, seen = Choosing(asked, routing), []
        for step in range(8):
            answers(model, given)
            fit.settle((step + 1) / 8)
            seen.append(routing.routers[0].usage.sum().item())
    real = given["attention_mask"].sum()
    assert seen == [0, 0, real, 2 * real, 2 * real, 2 * real, 2 * real, 2 * real]


def test_a_router_learns_which_head_serves_its_tokens():
    model, given = encoder(), texts()
    found = find_decoder(model)
    places = [units.site(found, index, "heads") for index in range(3)]
    target = answers(model, given)
    with routed(model, places, [2, 2, 2], 0) as routing, torch.enable_grad():
        routing.settle(1.0, False)
        (answers(model, given) - target).square().sum().backward()
        assert all(router.weight.grad.abs().sum() > 0 for router in routing.routers)
        assert all(router.usage.grad is None for router in routing.routers)


def test_heads_go_one_by_one_where_most_are_left():
    method = registry.build("shrp", "llm-weights", {})
    assert method.left([4, 4, 4], COST, TOTAL, 4 * COST / TOTAL) == [3, 3, 2]
    assert method.left([4, 1, 4], COST, TOTAL, 3 * COST / TOTAL) == [3, 1, 2]
    assert method.left([4, 4, 4], COST, TOTAL, 0.0) == [4, 4, 4]
    with pytest.raises(BudgetError, match="rounds to no head at all"):
        method.left([4, 4, 4], COST, TOTAL, 1e-4)
    with pytest.raises(BudgetError, match="a head of every block stays"):
        method.left([4, 4, 4], COST, TOTAL, 10 * COST / TOTAL)


@pytest.mark.parametrize("name", NAMES)
def test_heads_leave_the_loss_falls_and_the_record_makes_the_same_model_of_the_dense_one(name, passages):
    driver, subject = driver_of(passages, epochs=4.0), subject_of(encoder(name))
    driver.prepare(subject)
    handle = driver.apply(subject, None)
    first, last = handle.fitted["losses"]["classes"]  # with all heads; with those that stay
    assert last < 0.6 * first
    assert handle.achieved().value == pytest.approx(0.25, abs=COST / TOTAL / 2)
    assert [row["heads"] for row in handle.per_layer()] == ["3 of 4", "2 of 4", "2 of 4"]
    again, given = encoder(name), texts()
    prune_weights.reload(driver, driver.decoder(again), handle.tensors(by_reference=True))
    assert torch.equal(answers(again, given), answers(subject.model, given))
    assert not any(parameter.requires_grad for parameter in subject.model.parameters())
    assert not any(module._forward_pre_hooks for module in subject.model.modules())


def test_nothing_is_trained_where_nothing_goes(passages):
    driver, subject, dense = driver_of(passages, 0.0), subject_of(encoder()), encoder()
    driver.apply(subject, None)
    given = texts()
    ids = given["input_ids"], given["attention_mask"]
    assert torch.equal(outputs(subject.model, *ids)[0], outputs(dense, *ids)[0])


@pytest.mark.parametrize("settings", [{"grow": 0.5}, {"choose": 0.0}, {"epochs": 0.05}])
def test_a_training_that_never_counts_which_heads_are_taken_is_refused(settings, passages):
    with pytest.raises(UserError, match="in none of them is routing full"):
        driver_of(passages, **settings).apply(subject_of(encoder()), None)


def asked(folder, passages, out, *more):
    small = "--set epochs=0.3 --set batch=4 --set lr=1e-3"
    return [
        *f"--method shrp --sparsity 0.25 --fit {passages} {small} {folder} --data {passages}".split(),
        *f"--out {out} --json".split(),
        *SMALL,
        *more,
    ]


@pytest.mark.parametrize("how", [[], ["--by-reference"]])
def test_what_is_written_is_what_was_trained(how, folder, passages, tmp_path):
    out = tmp_path / "out"
    report = json.loads(run(*asked(folder, passages, out, *how)).stdout)
    assert report["fit"]["steps"] > 0
    assert report["budget"]["achieved"] == pytest.approx(0.25, abs=COST / TOTAL / 2)
    probe = artifact.read_tensors(out / "probe.safetensors")
    again = tprune.load(str(out))
    ids = probe["input"]
    assert sum(one.numel() for one in again.parameters()) < sum(one.numel() for one in encoder().parameters())
    assert again(input_ids=ids).logits.isfinite().all()


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(folder, passages, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(*asked(folder, passages, whole))
    stopping(3, monkeypatch)
    with pytest.raises(StoppedError):
        run(*asked(folder, passages, broken))
    run(*asked(folder, passages, broken))
    files = [place / "model.safetensors" for place in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_two_processes_make_the_model_that_one_makes_and_one_of_them_writes_it(folder, passages, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run(*asked(folder, passages, one, "--no-eval"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*launcher, "-m", "tprune.cli", "llm-weights", *asked(folder, passages, two, "--no-eval")]
    subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True)
    # Weights are not compared: a bias of keys has no gradient but rounding, of which the optimizer makes steps.
    dense = answers(encoder(), texts())
    alone, together = (answers(tprune.load(str(place)), texts()) for place in (one, two))
    assert (together - alone).norm() < 1e-2 * (alone - dense).norm()


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        (encoder, {"sparsity": 0.25}, "must be trained: add --fit"),
        (encoder, {"pattern": "2:4", "fit": "built-in"}, "removes structure"),
        (encoder, {"fit": "built-in"}, "needs a budget"),
        (encoder, {"sparsity": 0.25, "fit": "built-in", "loadable": "plain"}, "--loadable plain"),
        (decoder, {"sparsity": 0.25, "fit": "built-in"}, "prunes text encoders"),
    ],
)
def test_what_does_not_go_is_refused_in_one_line(model, options, says, text):
    with pytest.raises(UserError, match=says):
        prune(model(), "shrp", text, **options)


def test_an_encoder_without_a_classifier_and_low_precision_are_refused(passages):
    with pytest.raises(UserError, match="learns from classes"):
        driver_of(passages).apply(subject_of(encoder(head=False)), None)
    stage = Stage("llm-weights", "shrp", sparsity=0.25, fit=str(passages))
    with pytest.raises(UserError, match="give --dtype float32"):
        pipeline(Recipe(ModelSource("tiny"), (stage,), dtype="bfloat16"), stage, Progress()).check()
