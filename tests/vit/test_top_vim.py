"""ToP-ViM and the Vision Mamba it prunes: as the authors' code has both, and states that stay aligned."""

import json

import pytest
import timm
import torch

import tprune
from tests.fits import interrupted, same
from tests.golden_values import golden, under
from tests.test_cli import call
from tprune import artifact
from tprune.core.scan import selective_scan
from tprune.errors import UserError
from tprune.methods import registry
from tprune.models import save
from tprune.models.source import Source
from tprune.models.state_space import gaps, in_front
from tprune.models.subject import Subject
from tprune.models.vim import Mixer, VisionMamba
from tprune.pipelines.run import pipeline
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe, Stage

TENSORS, FACTS = golden("vit", "top-vim")
LAYERS = (11, 22)
"""Of 24 blocks what the golden model's 5 and 10 are of 11."""
RELEASED = {"layers": LAYERS, "score": "released", "align": False}


def vim(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VisionMamba(**FACTS["settings"]["model"] | changes).eval().requires_grad_(False)


@pytest.fixture
def model():
    model = vim()
    model.load_state_dict(under(TENSORS, "model."))
    return model


@pytest.fixture
def images():
    return TENSORS["image"].float()


@pytest.mark.parametrize("case", FACTS["settings"]["cases"])
def test_logits_agree_with_the_authors_code(case, model, images):
    ratio = FACTS["settings"]["cases"][case]["token_keep_ratio"]
    if ratio == 1:
        assert torch.allclose(model(images), TENSORS["dense.logits"], atol=1e-5)
        return
    with tprune.prune(model, "top-vim", ratio=ratio, **RELEASED) as handle:
        assert torch.allclose(model(images), TENSORS[f"{case}.logits"], atol=1e-5)
        assert [stage.site.layer for stage in handle.driver.stages] == FACTS["settings"]["layers"]


def test_the_backward_scan_is_seen_in_the_order_of_the_tokens(model, images):
    seen = []
    model.layers[4].mixer.observe = seen.append
    model(images)
    assert torch.allclose(seen[0].flip(-1), TENSORS["scan"], atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 9, 13])
def test_a_scan_of_runs_side_by_side_is_the_recurrence_and_so_is_its_gradient(length):
    generator = torch.Generator().manual_seed(length)
    x, time = (torch.randn(2, 3, length, generator=generator) for _ in range(2))
    into, out = (torch.randn(2, 4, length, generator=generator) for _ in range(2))
    parts = [x, time.exp(), -torch.rand(3, 4, generator=generator), into, out]
    for part in parts:
        part.requires_grad_()
    x, step, rate, into, out = parts
    state, y = torch.zeros(2, 3, 4), []
    for t in range(length):
        decay = (step[:, :, t, None] * rate).exp()
        state = decay * state + (step * x)[:, :, t, None] * into[:, None, :, t]
        y.append((state * out[:, None, :, t]).sum(-1))
    expected, found = torch.stack(y, -1), selective_scan(*parts)
    assert torch.allclose(found, expected, atol=1e-5)
    weight = torch.randn(expected.shape, generator=generator)
    slopes = [torch.autograd.grad((weight * one).sum(), parts) for one in (found, expected)]
    assert all(torch.allclose(*pair, atol=1e-4) for pair in zip(*slopes, strict=True))


def test_states_decay_over_what_has_left_as_over_tokens_without_content():
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(1, 3, 9, generator=generator) for _ in range(2)]
    into, out = (torch.randn(1, 2, 9, generator=generator) for _ in range(2))
    x, step, rate = draw[0], draw[1].exp(), -torch.rand(3, 2, generator=generator)
    kept, idle = torch.tensor([0, 3, 4, 7, 8]), torch.full((3, 1), 0.7)
    gone = torch.ones(9, dtype=torch.bool).index_fill(0, kept, False)
    whole = selective_scan(x * ~gone, torch.where(gone, idle, step), rate, into, out)
    before, after = gaps(kept[None])
    assert before.tolist() == [[0, 2, 0, 2, 0]]
    assert after.tolist() == [[2, 0, 2, 0, 0]]
    x, step, into, out = (part[..., kept] for part in (x, step, into, out))
    aligned = selective_scan(x, step, rate, into, out, before.unsqueeze(1) * idle)
    assert torch.allclose(aligned, whole[..., kept], atol=1e-6)


@pytest.mark.parametrize(
    ("kept", "before"),
    [
        ([0, 1, 4, 2, 3], [0, 0, 0, 0, 0]),
        ([0, 2, 4, 3, 8], [0, 1, 0, 0, 3]),
        ([1, 6, 4, 7, 8], [0, 3, 0, 0, 0]),
    ],
)
def test_a_class_token_that_moves_takes_no_gap_away(kept, before):
    found = gaps(torch.tensor([kept]))
    assert found[0].tolist() == [before]
    assert found[1].tolist() == [[*before[1:], 0]]


def test_alignment_changes_what_comes_after_a_gap_alone():
    mixer = Mixer(8)
    hidden = 3 * torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    hidden = torch.cat([hidden, hidden[:, :1]], 1)
    for step in (mixer.dt_proj, mixer.dt_proj_b):
        step.bias.data.fill_(0.5)
    kept = torch.tensor([[0, 1, 2, 5, 8, 9, 10]])
    outputs, seen = [], []
    mixer.observe = seen.append
    for gap in (None, gaps(torch.arange(7)[None]), gaps(kept)):
        outputs.append(mixer(hidden, gap))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-6)
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-4)
    assert torch.allclose(seen[0][..., 4:], seen[2][..., 4:], atol=1e-6)
    assert not torch.allclose(seen[0][..., :4], seen[2][..., :4], atol=1e-5)


def test_the_class_token_stays_in_the_middle_and_the_others_in_their_order(model, images):
    with tprune.prune(model, "top-vim", layers=LAYERS, ratio=0.6) as handle:
        handle.driver.record = True
        model(images)
        place = torch.arange(17).expand(2, -1)
        for _, reduction in handle.driver.trace.reductions:
            place = reduction.gather(place)
            assert place.shape[1] % 2 == 1
            assert (place[:, place.shape[1] // 2] == 8).all()
            patches = place[:, in_front(place.shape[1], "cpu")[1:]]
            assert (patches.diff(dim=1) > 0).all()
        assert handle.driver.trace.entering == handle.driver.entering[::2]
    assert in_front(5, "cpu").tolist() == [2, 0, 1, 3, 4]


def test_a_batch_equals_its_samples_and_keeping_all_is_bitwise_the_model(model, images):
    dense = model(images)
    with tprune.prune(model, "top-vim", keep=0.6) as handle:
        together = model(images)
        assert torch.allclose(together, torch.cat([model(one[None]) for one in images]), atol=1e-5)
        assert not torch.allclose(together, dense, atol=1e-4)
        assert abs(handle.achieved().value - 0.6) < 0.06
    assert torch.equal(model(images), dense)
    with tprune.prune(model, "top-vim", keep=1.0):
        assert torch.equal(model(images), dense)
    with pytest.raises(UserError, match="rounds to keeping all"):
        tprune.prune(model, "top-vim", keep=0.9999)


def test_other_methods_are_refused_and_plain_models_too():
    with pytest.raises(
        UserError, match="VisionMamba is a state-space model.*tome does not work; use top-vim, or a"
    ):
        tprune.prune(vim(), "vit/tome", keep=0.6)
    plain = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=6, num_heads=3)
    with pytest.raises(
        UserError, match="plain vision transformer, where top-vim does not work; use a Vim such as"
    ):
        tprune.prune(plain, "top-vim", keep=0.6)
    assert registry.running_on("state-space") == ["top-vim"]


def test_it_runs_in_half_precision(model, images):
    with tprune.prune(model.bfloat16(), "top-vim", keep=0.6):
        assert model(images.bfloat16()).dtype == torch.bfloat16


def subject_for_a_fit(folder):
    """A small Vim that tells as many classes as there are digits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 5, "num_classes": 10}
        model = timm.create_model("vim_tiny_patch16_224", pretrained=False, **settings)
    return Subject(model, None, Source("vim", "folder", str(folder), "timm"))


def test_an_interrupted_fit_of_a_vim_goes_on_to_the_same_weights(monkeypatch, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    stage = Stage("vit", "top-vim", keep=0.6, set={"epochs": 3 * 4 / 2048, "batch": 4}, fit="built-in")
    recipe = Recipe(ModelSource("a Vim in memory"), (stage,))

    def run(folder):
        folder.mkdir(exist_ok=True)
        subject = subject_for_a_fit(folder)
        with pipeline(recipe, stage, Progress()).apply(subject, folder):
            return {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}

    first = subject_for_a_fit(whole).model.state_dict()
    learned = run(whole)
    assert not same(learned, first)
    assert same(interrupted(lambda: run(parts), parts, monkeypatch), learned)


def test_a_vim_is_fitted_written_loaded_and_drawn(tmp_path):
    folder, out = tmp_path / "vim", tmp_path / "out"
    folder.mkdir()
    save.model(subject_for_a_fit(folder), folder)
    unfitted = call("vit", "--method", "top-vim", "--keep", "0.6", folder, "--limit", 2, "--no-eval").stderr
    assert "top-vim runs unfitted; --fit DATA fits it to this model" in unfitted.splitlines()
    asked = ["vit", "--method", "top-vim", "--keep", "0.6", "--fit", "built-in", "--set", "epochs=0.004"]
    report = json.loads(call(*asked, "--set", "batch=4", folder, "--limit", 4, "--out", out, "--json").stdout)
    assert report["fit"]["tuned"]
    assert report["pruned"]["flops"] < report["dense"]["flops"]
    loaded, probe = tprune.load(out), artifact.read_tensors(out / artifact.PROBE)
    with torch.no_grad():
        assert torch.allclose(loaded(probe["input"]), probe["output"], atol=1e-5)
    before = artifact.read_tensors(folder / "model.safetensors")
    assert not torch.equal(loaded.state_dict()["layers.4.mixer.A_log"], before["layers.4.mixer.A_log"])
