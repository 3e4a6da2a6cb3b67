"""Methods that learn: the loop, its checkpoints, the budget it meets, and what is left of it on disk."""

import json

import pytest
import torch
import transformers
from timm.models.eva import Eva

import tprune
from tests.conftest import SMALL, tiny_vit
from tests.fits import interrupted, same
from tests.test_cli import call
from tprune import artifact
from tprune.core.relax import gate, mask_attention
from tprune.data import images as pictures
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.fit import Fit
from tprune.methods.vit._ltmp_fit import Thresholds
from tprune.models.anatomy import anatomy
from tprune.models.load import timm_transform
from tprune.models.source import Source
from tprune.models.subject import Subject
from tprune.pipelines import fit_loop
from tprune.pipelines.run import pipeline
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe, Stage

LEARNERS = [name for name in registry.running_on("plain") if registry.load(name, "vit").learns != "no"]
REQUIRED = [name for name in LEARNERS if registry.load(name, "vit").learns == "required"]
OPTIONAL = [name for name in LEARNERS if name not in REQUIRED]
every_learner = pytest.mark.parametrize("method", LEARNERS)
STEPS = {"epochs": 3 * 4 / 2048, "batch": 4}
LARGE = {"diffrate": {"lr": 2.0}}
"""Steps that are large enough to move whole counts."""


def steps(method):
    return STEPS | LARGE.get(method, {}) | SMALL.get(method, {})


def neutral(method, model):
    return registry.build(method, "vit", SMALL.get(method)).neutral_state(anatomy(model).shape, 0)


def learned(method, model, keep=0.6, seed=0, **settings):
    with tprune.prune(
        model, f"vit/{method}", keep=keep, fit="built-in", seed=seed, **steps(method), **settings
    ) as handle:
        return handle.tensors(False), handle


@every_learner
def test_a_neutral_state_runs_batched_as_alone_and_the_model_is_restored(method, vit, images):
    dense, state = vit(images), neutral(method, vit)
    with tprune.prune(vit, f"vit/{method}", keep=0.6, state=state) as handle:
        together = vit(images)
        alone = torch.cat([vit(image[None]) for image in images])
        assert same(handle.tensors(False), state)
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.equal(vit(images), dense)


@every_learner
def test_three_steps_change_what_is_stored_and_the_same_seed_gives_the_same_bytes(method):
    model = tiny_vit(num_classes=10)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    first, handle = learned(method, model)
    again, _ = learned(method, tiny_vit(num_classes=10))
    assert same(first, again)
    assert handle.fitted["steps"] == 3
    assert not any(parameter.requires_grad for parameter in model.parameters())
    stands = same(dict(model.named_parameters()), before)
    assert stands != handle.fitted["tuned"]
    assert not (stands and same(first, neutral(method, model)))


@every_learner
def test_an_interrupted_fit_goes_on_to_the_same_bytes(method, monkeypatch, tmp_path):
    whole, _ = learned(method, tiny_vit(num_classes=10))
    stage = Stage("vit", method, keep=0.6, set=steps(method), fit="built-in")
    recipe = Recipe(ModelSource("a model in memory"), (stage,))

    def run():
        subject = Subject(tiny_vit(num_classes=10), None, Source("a model in memory", "memory", "", "timm"))
        with pipeline(recipe, stage, Progress()).apply(subject, tmp_path) as handle:
            return handle.tensors(False)

    assert same(interrupted(run, tmp_path, monkeypatch), whole)


def test_training_scenes_share_no_scan_with_the_evaluation():
    """The splits are disjoint by construction; here, that the fit's are of the training split."""
    scenes = pictures.training("built-in")
    assert scenes.protocol["split"] == "train"
    assert len(scenes) == scenes.protocol["samples"]
    image, label = scenes.sample(3)
    assert image.size == (96, 96)
    assert 0 <= label <= 9


def test_every_step_sees_its_share_of_one_order_and_every_epoch_all_images():
    data = pictures.TrainingScenes(count=6)
    whole = fit_loop.Batches(data, None, 4, seed=0)
    halves = [fit_loop.Batches(data, None, 4, seed=0, share=(rank, 2)) for rank in (0, 1)]
    steps = [whole.places(step) for step in range(3)]
    assert sorted(sum(steps, [])[:6]) == list(range(6))
    assert sorted(sum(steps, [])[6:]) == list(range(6))
    for step, places in enumerate(steps):
        assert [half.places(step) for half in halves] == [places[0::2], places[1::2]]
    assert whole.places(0) == steps[0]


def test_absent_tokens_get_no_attention_but_a_gradient():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, 5, generator=generator)
    present = torch.tensor([[1.0, 1, 0, 1, 0], [1, 1, 1, 1, 1]]).requires_grad_()
    rows = mask_attention(logits.softmax(-1), present, 0.0)
    bias = present.detach().log()[:, None, None, :]
    assert torch.allclose(rows, (logits + bias).softmax(-1), atol=1e-6)
    assert rows[0, :, :, 2].eq(0).all()
    (rows[..., 2].sum()).backward()
    assert present.grad[0, 2] > 0
    own = mask_attention(logits.softmax(-1), present.detach(), 1e-6, keep_self=True)
    assert own[0, :, 2, 2].gt(0).all()
    assert own.sum(-1).allclose(torch.ones(2, 3, 5))


def test_a_gate_is_hard_forward_and_smooth_backward():
    threshold = torch.tensor(0.5, requires_grad=True)
    values = torch.tensor([0.2, 0.5, 0.9, torch.inf])
    gates = gate(values, threshold, 0.1)
    assert gates.tolist() == [0, 0, 1, 1]
    gates.sum().backward()
    assert threshold.grad < 0


def test_where_counts_vary_the_fit_ends_at_the_budget_on_the_training_images():
    model = tiny_vit(num_classes=10)
    state, _ = learned("ltmp", model, keep=0.5)
    scenes = pictures.training("built-in")
    prepare = timm_transform(model)
    batch = torch.stack([prepare(scenes.sample(place)[0]) for place in range(64)])
    with tprune.prune(model, "ltmp", state=state) as handle:
        model(batch)
        assert abs(handle.achieved().value - 0.5) < 0.03


def test_without_labels_that_fit_the_dense_model_teaches():
    _, handle = learned("ltmp", tiny_vit(num_classes=7))
    assert handle.fitted["labels"] == "the dense model's"


@pytest.mark.parametrize("method", REQUIRED)
def test_a_method_that_must_learn_says_so_in_one_line(method, vit_folder):
    for extra in ([], ["--dry-run"]):
        with pytest.raises(UserError, match=f"{method} must be trained: add --fit"):
            call("vit", "--method", method, "--keep", "0.6", vit_folder, *extra)


@pytest.mark.parametrize("method", OPTIONAL)
def test_a_method_that_runs_unfitted_says_so_in_one_line(method, vit_folder):
    asked = ["vit", "--method", method, "--keep", "0.6", "--limit", 4, "--calibration", 4, "--no-eval"]
    lines = call(*asked, vit_folder).stderr.splitlines()
    assert lines.count(f"{method} runs unfitted; --fit DATA fits it to this model") == 1


def test_what_learns_nothing_is_not_fitted(vit):
    with pytest.raises(UserError, match="tome learns nothing"):
        tprune.prune(vit, "vit/tome", keep=0.6, fit="built-in")
    with pytest.raises(UserError, match="--fit nowhere: no such folder"):
        tprune.prune(vit, "ltmp", keep=0.6, fit="nowhere")
    with pytest.raises(UserError, match="give --keep below 1"):
        tprune.prune(vit, "ltmp", fit="built-in")


def test_what_cannot_be_learned_from_is_refused_before_anything_is_measured(
    vit_folder, tmp_path, monkeypatch
):
    monkeypatch.delattr("tprune.pipelines.vit.VitPipeline.evaluate")
    for method, why in (("ltmp", "no images"), ("dtop", "no annotations; give a folder")):
        with pytest.raises(UserError, match=f"--fit {tmp_path}: {why}"):
            call("vit", "--method", method, "--keep", "0.6", "--fit", tmp_path, vit_folder)


@every_learner
def test_a_fit_is_written_loaded_and_run_again_to_the_same_bytes(method, vit_folder, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    settings = [part for name, value in steps(method).items() for part in ("--set", f"{name}={value}")]
    asked = ["vit", "--method", method, "--keep", "0.6", "--fit", "built-in", *settings, vit_folder]
    assert "fit on built-in data" in call(*asked, "--dry-run").output
    report = json.loads(call(*asked, "--limit", 8, "--out", out, "--json").stdout)
    assert report["fit"]["steps"] == 3
    assert report["fit"]["data"]["split"] == "train"
    files = sorted(file.name for file in out.glob("*.safetensors"))
    stored = artifact.read_tensors(out / artifact.TENSORS) if artifact.TENSORS in files else {}
    assert {name: list(tensor.shape) for name, tensor in stored.items()} == report["fit"]["learned"]
    assert stored or report["fit"]["tuned"]

    model, probe = tprune.load(out), artifact.read_tensors(out / artifact.PROBE)
    with torch.no_grad():
        assert torch.allclose(model(probe["input"]), probe["output"], atol=1e-5)
    assert same(model.tprune_handle.tensors(False), stored)
    assert "unfitted" not in call("eval", out, "--limit", 4).output
    assert "fit: 3 steps of 4 images" in call("run", out / "recipe.yaml", "--out", again, "--quiet").output
    assert all((again / file).read_bytes() == (out / file).read_bytes() for file in files)


def test_ltmp_thresholds_leave_all_prefix_tokens_in_front(images):
    model = tiny_vit(reg_tokens=3)
    given = {"merge_threshold": 0.5, "prune_threshold": 0.05}
    with tprune.prune(model, "ltmp", **given) as handle:
        handle.driver.record = True
        together = model(images)
        found = [reduction for _, reduction in handle.driver.trace.reductions]
        alone = torch.cat([model(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-5)
    assert found[-1].count < found[0].length
    for reduction in found:
        assert torch.equal(reduction.index[:, :4], torch.arange(4).expand(3, 4))


def test_a_folder_of_class_folders_can_be_fitted_on(tmp_path):
    for place in range(8):
        image, _ = pictures.training("built-in").sample(place)
        (tmp_path / f"class{place % 2}").mkdir(exist_ok=True)
        image.save(tmp_path / f"class{place % 2}" / f"{place}.png")
    settings = {"epochs": 1.0, "batch": 4}
    with tprune.prune(tiny_vit(), "ltmp", keep=0.6, fit=str(tmp_path), **settings) as handle:
        assert handle.fitted["steps"] == 2
        assert handle.fitted["data"]["samples"] == 8
        assert handle.fitted["labels"] == "the data's"


def hugging_face():
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=8,
        num_labels=10,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=48,
    )
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    return transformers.ViTForImageClassification(config), processor


def rotary():
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3}
    return Eva(**settings, num_classes=10, use_rot_pos_emb=True, global_pool="token"), None


@pytest.mark.parametrize("make", [hugging_face, rotary])
@pytest.mark.parametrize("method", ["ltmp", "diffrate", "tnt"])
def test_models_of_other_makes_are_fitted(method, make, images):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = make()
    model.eval()
    with tprune.prune(
        model, method, keep=0.6, fit="built-in", tokenizer=processor, **steps(method)
    ) as handle:
        out = model(images)
        assert torch.isfinite(out if isinstance(out, torch.Tensor) else out.logits).all()
        assert handle.fitted["steps"] == 3


@pytest.mark.parametrize("kept", [[], ["--by-reference"]], ids=["copied", "by reference"])
def test_weights_that_a_fit_tunes_are_stored_with_it(kept, monkeypatch, vit_folder, tmp_path):
    out = tmp_path / "out"
    monkeypatch.setattr(Thresholds, "tunes", "all")
    monkeypatch.setattr(Thresholds, "groups", Fit.groups)
    settings = [part for name, value in STEPS.items() for part in ("--set", f"{name}={value}")]
    asked = ["vit", "--method", "ltmp", "--keep", "0.6", "--fit", "built-in", *settings, vit_folder]
    call(*asked, *kept, "--limit", 8, "--out", out, "--quiet")
    model, probe = tprune.load(out), artifact.read_tensors(out / artifact.PROBE)
    before = artifact.read_tensors(vit_folder / "model.safetensors")
    assert (out / "model.safetensors").exists() != bool(kept)
    assert not torch.equal(model.state_dict()["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])
    with torch.no_grad():
        assert torch.allclose(model(probe["input"]), probe["output"], atol=1e-5)
