"""Heads, channels and blocks of vision transformers: what is silenced, masked and cut is the same, and loads again."""

import copy

import pytest
import timm
import torch
import transformers

import tprune
from tests.conftest import tiny_vit
from tests.llm_weights.test_structure import silence
from tests.llm_weights.test_vision import MAKES, QUIET, classifier, on_disk, pixels, processor, tower
from tests.vit.test_towers import SMALL, built, logits
from tprune.core.weights import StructureEdit
from tprune.errors import UserError
from tprune.methods import registry
from tprune.models import shapes, units
from tprune.models.calibrate import Stream
from tprune.models.feed import Pictures
from tprune.models.find import find_blocks
from tprune.models.halves import masked
from tprune.models.vision_blocks import check_structure
from tprune.pipelines.run import execute
from tprune.pipelines.structure import at_summaries
from tprune.recipe import ModelSource, Recipe, Stage, read

METHODS = registry.running_on("vision", "llm-weights")
SET = {"cfsp": {"multiple": 1}}


def dinov3():
    """Of transformers: rotary positions, and an MLP without a gate."""
    config = transformers.DINOv3ViTConfig(image_size=32, patch_size=8, num_register_tokens=2, **SMALL)
    return built(lambda: transformers.AutoModel.from_config(config))


MAKES = MAKES | {
    "timm norms, scales and registers": lambda: tiny_vit(qk_norm=True, init_values=0.3, reg_tokens=2),
    "swiglu": lambda: tower("dinov2", use_swiglu_ffn=True),
    "dinov3 of transformers": dinov3,
}


@pytest.mark.parametrize("name", MAKES)
def test_silenced_masked_and_sliced_vision_transformers_are_the_same(name):
    sliced, given = MAKES[name](), pixels(2)
    for parameter_name, parameter in sliced.named_parameters():
        if parameter_name.endswith(("gamma_1", "gamma_2")):
            parameter.fill_(0.5)  # 1e-5 at first, with which blocks do nothing
    found = find_blocks(sliced)
    places = {kind: units.site(found, 0, kind) for kind in units.WIRING}
    assert set(places) == {kind for kind, place in places.items() if place} or name == "dinov3"
    keep = {kind: torch.arange(1, place.count, 2) for kind, place in places.items() if place}
    cut, gone = StructureEdit(0, keep=keep), StructureEdit(2, removed=True)
    silent, dense = copy.deepcopy(sliced), copy.deepcopy(sliced)
    silence(find_blocks(silent), [cut])
    with masked(find_blocks(silent), [gone]):
        expected = logits(silent, given)
    assert (logits(dense, given) - expected).abs().max() > 1e-3
    with masked(find_blocks(dense), [cut, gone]):
        assert torch.allclose(logits(dense, given), expected, atol=1e-5)
    shapes.apply(found, [cut, gone])
    assert torch.allclose(logits(sliced, given), expected, atol=1e-5)
    assert len(find_blocks(sliced).blocks) == len(find_blocks(dense).blocks) - 1
    assert {kind: units.site(found, 0, kind).count for kind in keep} == {
        kind: len(stay) for kind, stay in keep.items()
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["timm", "dinov2"])
def test_a_vision_transformer_gets_as_small_as_was_asked(method, name):
    model = classifier() if name == "timm" else tower(name, num_labels=10)
    options = {} if name == "timm" else {"tokenizer": processor()}
    whole = sum(matrix.read().numel() for matrix in all_matrices(model))
    stage = {"calibration": 4, "batch_size": 2} | SET.get(method, {})
    handle = tprune.prune(model, f"llm-weights/{method}", sparsity=0.25, **stage, **options)
    left = sum(matrix.read().numel() for matrix in all_matrices(model))
    assert handle.achieved().value == 1 - left / whole == pytest.approx(0.25, abs=0.03)  # half a head
    assert logits(model, pixels()).isfinite().all()


def all_matrices(model):
    found = find_blocks(model)
    return [matrix for index in range(len(found.blocks)) for matrix in found.matrices(index)]


def asked(folder, method, sparsity, loadable="any"):
    """A recipe of noise images, so that nothing but the model decides."""
    stage = Stage("llm-weights", method, sparsity=sparsity, loadable=loadable)
    return Recipe(ModelSource(str(folder)), (stage,), limit=4, calibration=3, batch_size=4)


@pytest.mark.parametrize(
    ("name", "method", "sparsity", "loadable", "kind"),
    [
        ("timm", "flap", 0.4, "any", "wrapped"),
        ("timm", "flap", 0.3, "plain", "plain"),
        ("timm", "shortgpt", 0.5, "any", "plain"),
        ("vit", "mag-sp", 0.4, "plain", "plain"),
        ("dinov2", "mag-sp", 0.25, "plain", "plain"),
        ("dinov2", "shortgpt", 0.25, "any", "plain"),
        ("clip", "wanda-sp", 0.4, "any", "wrapped"),
    ],
)
def test_a_smaller_vision_transformer_is_written_loaded_and_made_again(
    name, method, sparsity, loadable, kind, tmp_path
):
    on_disk(name, tmp_path / "model")
    recipe = asked(tmp_path / "model", method, sparsity, loadable)
    report = execute(recipe, QUIET, out=str(tmp_path / "out"))
    assert report["kind"] == kind
    assert report["pruned"]["flops"] < report["dense"]["flops"]
    again = tprune.load(str(tmp_path / "out"))
    assert sum(p.numel() for p in again.parameters()) == report["parameters"]
    if kind == "plain":
        stock = (
            timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
            if name == "timm"
            else type(again).from_pretrained(tmp_path / "out").eval()
        )
        assert torch.equal(logits(stock, pixels()), logits(again, pixels()))
    execute(read(tmp_path / "out" / "recipe.yaml"), QUIET, out=str(tmp_path / "two"), evaluate=False)
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("out", "two")]
    assert weights[0] == weights[1]
    execute(recipe, QUIET, out=str(tmp_path / "small"), evaluate=False, by_reference=True)
    assert torch.equal(logits(tprune.load(str(tmp_path / "small")), pixels()), logits(again, pixels()))


@pytest.mark.parametrize("name", ["timm", "vit"])
def test_what_was_cut_can_be_pruned_again_and_lose_tokens(name, tmp_path):
    on_disk(name, tmp_path / "model")
    execute(asked(tmp_path / "model", "flap", 0.4), QUIET, out=str(tmp_path / "cut"), evaluate=False)
    report = execute(
        asked(tmp_path / "cut", "wanda", 0.5), QUIET, out=str(tmp_path / "masked"), evaluate=False
    )
    assert report["kind"] == "wrapped"
    tokens = Recipe(ModelSource(str(tmp_path / "masked")), (Stage("vit", "tome", keep=0.75),), limit=2)
    assert execute(tokens, QUIET)["budget"]["achieved"] < 1


def test_plain_is_refused_where_a_configuration_has_no_words_for_it():
    with pytest.raises(
        UserError, match="--loadable plain: the configuration of a siglip_vision_model model has no"
    ):
        tprune.prune(tower("siglip"), "mag-sp", sparsity=0.3, loadable="plain", tokenizer=processor())


def test_angles_of_blocks_are_between_class_tokens():
    model, given = classifier(), pixels(3)
    handle = tprune.prune(model, "shortgpt", sparsity=0.25, calibration=3, batch_size=2, metric="angular")
    assert len(model.blocks) == 3
    assert handle.achieved().value == 0.25
    stream = Stream(find_blocks(model), Pictures(given, 17, None), batch_size=2)
    assert torch.equal(at_summaries(stream), stream.hidden[:, 0])


def test_a_sapiens_of_equal_blocks_keeps_all_of_them_since_timm_builds_no_fewer():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_sapiens2")
        with pytest.raises(AssertionError, match="one entry per block"):
            timm.create_model("vit_base_patch16_sapiens2", depth=11)
    with pytest.raises(UserError, match="num_kv_heads"):
        check_structure(model)


def test_looking_for_the_blocks_of_a_model_leaves_nothing_on_it():
    model = classifier()
    before = set(vars(model))
    find_blocks(model)
    assert set(vars(model)) == before


@pytest.mark.parametrize(
    ("make", "method", "said"),
    [
        ("vit_small_patch16_dinov3", "mag-sp", "mag-sp does not fit this model: the heads of Eva cannot be"),
        (
            "eva02_tiny_patch14_224",
            "kcm",
            "kcm does not fit this model: the channels of Eva cannot be removed",
        ),
        (
            "vit_dwee_patch16_reg1_gap_256",
            "mag-sp",
            "mag-sp does not fit this model: the heads of VisionTransformer cannot be",
        ),
        (
            "vit_small_patch16_rope_mixed_224",
            "shortgpt",
            "positions or sizes of its own for every block or head .*rope.freqs",
        ),
        ("swin_tiny_patch4_window7_224", "flap", "SwinTransformer is not a plain vision transformer"),
    ],
)
def test_what_cannot_leave_is_refused_in_one_line(make, method, said):
    size = 28 if "14" in make else 224 if "swin" in make else 32
    depth = {} if "swin" in make else {"depth": 2}
    model = timm.create_model(make, pretrained=False, img_size=size, **depth)
    with pytest.raises(UserError, match=said) as caught:
        tprune.prune(model, f"llm-weights/{method}", sparsity=0.5, calibration=1)
    assert "\n" not in str(caught.value)
