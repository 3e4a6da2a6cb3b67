"""STViT: semantic tokens as the authors' code makes them in a Swin, and by the paper's equations in a plain model."""

import json

import pytest
import torch
import transformers
from timm.models.swin_transformer import SwinTransformer

import tprune
from tests.conftest import start, tiny_vit
from tests.golden_values import golden, under
from tests.test_cli import call
from tprune import artifact
from tprune.core import grid as tiling
from tprune.data import images as scans
from tprune.errors import UserError
from tprune.methods import registry
from tprune.models import load, save
from tprune.models.kinds import dissect
from tprune.models.source import Source, resolve
from tprune.models.subject import Subject
from tprune.recipe import ModelSource

TENSORS, FACTS = golden("vit", "stvit")
OTHERS = [fact.id for fact in registry.facts("vit") if fact.id not in registry.running_on("windows")]


def timm_swin(**changes):
    arguments = FACTS["settings"]["model"] | {"num_classes": 10} | changes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SwinTransformer(**arguments).eval().requires_grad_(False)


def hugging_face_swin():
    config = transformers.SwinConfig(
        image_size=56, embed_dim=12, depths=[6], num_heads=[3], window_size=7, num_labels=10
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.SwinForImageClassification(config).eval().requires_grad_(False)


def logits(out):
    return out if isinstance(out, torch.Tensor) else out.logits


every_swin = pytest.mark.parametrize("make", [timm_swin, hugging_face_swin])


@pytest.fixture
def pictures():
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", FACTS["settings"]["cases"])
def test_a_stage_agrees_with_the_authors_code(case):
    given = under(TENSORS, f"{case}.")
    model, seen = timm_swin(num_classes=0), []
    missing = model.load_state_dict(given, strict=False).missing_keys
    assert all(
        name == "norm.weight" or name == "norm.bias" or "relative_position" in name for name in missing
    )
    state = {"count": torch.tensor(36)} | ({"centres": given["centres"]} if "centres" in given else {})
    model.layers[0].register_forward_hook(lambda stage, args, output: seen.append(output))
    with tprune.prune(model, "stvit", state=state, **FACTS["settings"]["cases"][case]):
        model(TENSORS["image"])
    assert torch.allclose(seen[0].flatten(1, 2), given["output"], atol=2e-5)


def test_in_a_plain_model_two_blocks_run_by_the_papers_equations(images):
    """S = FFN(P + A(P, [P, X])), then FFN(S + G + A(S + G, [S, X])), each with the block's weights."""
    model = tiny_vit()
    state = start("stvit", model)["state"]
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, output: seen.append(output))
    with tprune.prune(model, "stvit", state=state, cells=7):
        model(images)
    x, made, refined = seen[0], seen[1], seen[2]

    def cross(block, tokens, keys):
        heads, width = block.attn.num_heads, block.attn.head_dim
        q = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, heads, width))[:, :, 0]
        k, v = block.attn.qkv(block.norm1(keys)).unflatten(-1, (3, heads, width))[:, :, 1:].unbind(2)
        weight = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(width**-0.5).softmax(-1)
        tokens = tokens + block.attn.proj(torch.einsum("bhqk,bkhd->bqhd", weight, v).flatten(2))
        return tokens + block.mlp(block.norm2(tokens))

    corners = x[:, 1:].view(-1, 2, 2, 2, 2, 24).amax((2, 4)).flatten(1, 2)
    head, image = x[:, :1], x[:, 1:]
    wanted = cross(model.blocks[1], torch.cat([head, corners], 1), torch.cat([head, corners, image], 1))
    assert torch.allclose(made, wanted, atol=1e-5)
    centres = torch.nn.functional.interpolate(
        state["centres"].permute(2, 0, 1)[None], (2, 2), mode="bilinear"
    )
    moved = made.clone()
    moved[:, 1:] += centres[0].flatten(1).T
    wanted = cross(model.blocks[2], moved, torch.cat([made, image], 1))
    assert torch.allclose(refined, wanted, atol=1e-5)


@every_swin
def test_in_a_swin_a_batch_equals_its_samples_and_the_model_is_restored(make, pictures):
    model = make()
    dense = logits(model(pictures))
    with tprune.prune(model, "stvit", keep=0.7, **start("stvit", model)) as handle:
        together = logits(model(pictures))
        alone = torch.cat([logits(model(one[None])) for one in pictures])
        achieved = handle.achieved().value
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(together, dense, atol=1e-5)
    assert abs(achieved - 0.7) < 0.06
    assert torch.equal(logits(model(pictures)), dense)
    with tprune.prune(model, "stvit", keep=1.0, **start("stvit", model)):
        assert torch.equal(logits(model(pictures)), dense)


def test_in_a_swin_the_budget_counts_all_stages():
    model = timm_swin(img_size=112, depths=(2, 6), num_heads=(2, 3))
    with tprune.prune(model, "stvit", **start("stvit", model)) as handle:
        model(torch.zeros(1, 3, 112, 112))
        rows = handle.per_layer()
        assert [row["tokens_mlp"] for row in rows] == [784, 784, 196, 36, 36, 36, 36, 196]
        assert [row["tokens_attention"] for row in rows][2:] == [196, 232, 232, 36, 36, 196]
        whole = (4 + (2 * 196 + 232 + 36 + 232 + 36 + 4 * 36 + 2 * 196) / 196) / 16
        assert handle.achieved().value == pytest.approx(whole)


@every_swin
def test_every_other_method_refuses_a_swin_and_names_stvit(make):
    model = make()
    for method in OTHERS:
        says = f"Swin.* fixed windows, where {method} does not work; use stvit, or a "
        with pytest.raises(UserError, match=says):
            tprune.prune(model, f"vit/{method}", keep=0.6)


def test_other_window_models_are_refused_by_name():
    model = type("MaxVit", (torch.nn.Module,), {})()
    with pytest.raises(UserError, match="MaxVit attends within fixed windows.* with stvit a Swin"):
        dissect(model)


def test_a_swin_is_fitted_written_and_loaded_again(tmp_path):
    folder, out = tmp_path / "swin", tmp_path / "out"
    folder.mkdir()
    import timm

    settings = {name: value for name, value in FACTS["settings"]["model"].items() if name != "num_classes"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(
            "swin_tiny_patch4_window7_224", pretrained=False, num_classes=10, **settings
        )
    save.model(Subject(model, None, Source("swin", "folder", str(folder), "timm")), folder)
    asked = [
        "vit",
        "--method",
        "stvit",
        "--fit",
        "built-in",
        "--set",
        "epochs=0.004",
        "--set",
        "batch=4",
        folder,
    ]
    report = json.loads(call(*asked, "--limit", 4, "--out", out, "--json").stdout)
    assert report["fit"]["learned"] == {"centres": [6, 6, 12], "count": []}
    loaded, probe = tprune.load(out), artifact.read_tensors(out / artifact.PROBE)
    with torch.no_grad():
        assert torch.allclose(loaded(probe["input"]), probe["output"], atol=1e-5)


def test_fitting_beats_not_fitting_at_the_same_budget():
    subject = load.load(
        resolve(ModelSource("digits-vit"), "vit"), "vit", device="cpu", dtype="float32", seed=0
    )
    scenes, model = scans.built_in(100), subject.model
    pixels = torch.stack([subject.processor(scenes.open(place)) for place in range(100)])
    labels = torch.tensor(scenes.labels)

    def accuracy():
        with torch.no_grad():
            return (model(pixels).argmax(-1) == labels).double().mean().item()

    with tprune.prune(model, "stvit", keep=0.45, **start("stvit", model)):
        unfitted = accuracy()
    # So few steps must be smaller ones: at the method's own rate they end before the model has found its way back.
    short = {"batch": 8, "epochs": 40 * 8 / 2048, "lr": 2e-4}
    with tprune.prune(model, "stvit", keep=0.45, fit="built-in", **short):
        assert accuracy() > unfitted + 0.05


def test_windows_reach_inside_at_the_border_and_to_both_sides_elsewhere():
    around = tiling.overlapping((14, 14), (7, 7), 3)
    assert around.shape == (4, 100)
    assert around[:, 0].tolist() == [0, 4, 56, 60]
    middle = tiling.overlapping((12, 12), (4, 4), 2)[4]
    assert middle[0] == 3 * 12 + 3
    assert middle[-1] == 8 * 12 + 8


@pytest.mark.parametrize(
    "case", [((14, 14), (14, 14), (4, 4)), ((5, 7), (5, 7), (4, 3)), ((8, 8), (4, 4), (3, 3))]
)
def test_every_token_has_one_cell_and_every_cell_a_token_in_its_middle(case):
    owner, middle = tiling.cell_owners(*case)
    assert torch.equal(owner[middle], torch.arange(len(middle)))
    assert owner.bincount().min() >= 1
    assert len(middle) == tiling.pool_cells(torch.zeros(1, len(owner), 1), *case).shape[1]


def test_parts_of_a_swin_are_those_of_its_longest_stage():
    shape = dissect(timm_swin(img_size=112, depths=(2, 6), num_heads=(2, 3))).shape
    assert (shape.span, shape.tokens, shape.window, shape.width) == ((2, 8), 196, 7, 24)
