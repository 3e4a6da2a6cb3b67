"""Vision transformers as subjects: what they are calibrated on, what they lose, how they are stored."""

import pytest
import timm
import torch
import transformers
from PIL import Image

import tprune
from tests.conftest import tiny_vit
from tests.llm_weights.test_contract import MASKING
from tests.videos import videomae
from tests.vit.test_towers import SMALL, TOWERS, built, logits
from tprune.data import images as pictures
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.selective import SelectiveMethod
from tprune.models.calibrate import Stream
from tprune.models.feed import Pictures
from tprune.models.find import find_blocks
from tprune.models.gradients import gradient_norms
from tprune.models.standing_in import answering
from tprune.pipelines.drawn import drawn
from tprune.pipelines.run import execute
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe, Stage, read

QUIET = Progress(quiet=True)
BUILT = {name: registry.build(name, "llm-weights") for name in MASKING}
REFUSED = [name for name, built in BUILT.items() if built.wraps or "triples" in built.stats]
METHODS = [
    name for name, built in BUILT.items() if name not in REFUSED and not isinstance(built, SelectiveMethod)
]


def classifier():
    """A tiny classifier of digits."""
    return tiny_vit(num_classes=10)


def tower(name, **changes):
    """A tiny vision transformer of transformers."""
    kind, config, extra, _ = TOWERS[name]
    config = getattr(transformers, config)(image_size=32, patch_size=8, **SMALL, **extra | changes)
    return built(lambda: getattr(transformers, kind)(config))


def eva():
    """One whose blocks are given rotary positions."""
    return built(
        lambda: timm.create_model("vit_small_patch16_dinov3", pretrained=False, depth=3, img_size=32)
    )


MAKES = {"timm": classifier, "dinov3": eva} | {name: lambda name=name: tower(name) for name in TOWERS}


def pixels(count=5):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def prune(model, method, **options):
    return tprune.prune(model, f"llm-weights/{method}", **{"calibration": 4, "batch_size": 2} | options)


def matrices(model, part="all"):
    found = find_blocks(model)
    found.part = part
    return [matrix for index in range(len(found.blocks)) for matrix in found.matrices(index)]


@pytest.mark.parametrize("name", MAKES)
def test_images_sent_through_block_by_block_end_where_the_model_ends(name):
    model, given = MAKES[name](), pixels()
    decoder = find_blocks(model)
    stream = Stream(decoder, Pictures(given, 17, None), batch_size=2)
    for index in range(len(decoder.blocks)):
        stream.advance(index)
    with torch.no_grad(), answering(decoder, stream.hidden):
        found = logits(model, given)
    assert torch.allclose(found, logits(model, given), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["timm", "dinov2"])
def test_every_matrix_of_a_block_loses_exactly_its_share_and_nothing_else_does(method, name, images):
    model = classifier() if name == "timm" else tower(name, num_labels=10)
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    options = {} if name == "timm" else {"tokenizer": processor()}
    assert prune(model, method, sparsity=0.5, **options).achieved().value == 0.5
    pruned = matrices(model, registry.load(method, "llm-weights").part)
    assert all((matrix.read() == 0).double().mean() == 0.5 for matrix in pruned)
    inside = {matrix.parameter_name for matrix in pruned}
    for key, value in model.state_dict().items():
        assert key in inside or torch.equal(value, kept[key])
    assert logits(model, images).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_patterns_hold(method):
    model = classifier()
    details = prune(model, method, pattern="2:4").achieved().details
    assert details["groups_within_pattern"] == 1


def processor():
    """What makes pixels for a tiny tower."""
    return transformers.ViTImageProcessor(size={"height": 32, "width": 32})


def test_wanda_s_norms_are_over_the_patches_and_class_tokens_of_training_scenes():
    model, dense = classifier(), classifier()
    prune(model, "wanda", sparsity=0.5)
    scenes = pictures.TrainingScenes(4)
    transform = timm.data.create_transform(
        **timm.data.resolve_model_data_config(model, {"input_size": (3, 32, 32)}), is_training=False
    )
    batch = torch.stack([transform(scenes.sample(place)[0]) for place in range(4)])
    seen, first = {}, dense.blocks[0].mlp.fc1
    hook = first.register_forward_pre_hook(lambda module, given: seen.update(x=given[0]))
    dense(batch)
    hook.remove()
    assert seen["x"].shape[:2] == (4, 17)
    score = first.weight.abs() * seen["x"].flatten(0, 1).norm(dim=0)
    gone = torch.zeros_like(score, dtype=torch.bool).scatter_(
        1, score.sort(dim=1, stable=True).indices[:, :12], True
    )
    assert torch.equal(model.blocks[0].mlp.fc1.weight == 0, gone)


def test_a_fused_qkv_counts_as_the_three_matrices_that_it_fuses():
    model = classifier()
    names = [matrix.name for matrix in find_blocks(model).matrices(0)]
    assert names[:3] == [f"blocks.0.attn.qkv.{part}" for part in "qkv"]
    prune(model, "magnitude", sparsity=0.5)
    for part in model.blocks[0].attn.qkv.weight.chunk(3):
        assert (part == 0).double().mean() == 0.5


def test_gradients_are_of_the_cross_entropy_of_the_images_classes():
    model, given, classes = classifier(), pixels(3), torch.tensor([1, 7, 4])
    decoder = find_blocks(model)
    found = gradient_norms(decoder, Pictures(given, 17, classes))
    weight = model.blocks[1].mlp.fc2.weight.requires_grad_()
    squares = 0
    for image, label in zip(given, classes, strict=True):
        loss = -model(image[None]).log_softmax(-1)[0, label]
        squares = squares + torch.autograd.grad(loss, weight)[0].square()
    assert torch.allclose(found["blocks.1.mlp.fc2.weight"], squares.sqrt(), rtol=1e-4, atol=1e-6)


def test_an_allocation_gives_matrices_of_a_vision_transformer_different_shares():
    for rule in ("owl:factor=2,spread=0.2", "tamp-das"):
        model = classifier()
        prune(model, "wanda", sparsity=0.5, allocate=rule)
        assert len({(matrix.read() == 0).sum().item() for matrix in matrices(model)}) > 1


@pytest.fixture
def folder(tmp_path):
    """Twelve images in ten folders, one for each class."""
    generator = torch.Generator().manual_seed(4)
    for place in range(12):
        (tmp_path / "data" / f"{place % 10}").mkdir(parents=True, exist_ok=True)
        image = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(image.numpy()).save(tmp_path / "data" / f"{place % 10}" / f"{place}.png")
    return tmp_path / "data"


def on_disk(name, folder):
    """A tiny model in its library's format."""
    if name == "timm":
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
        folder.mkdir()
        timm.models.save_for_hf(
            model, folder, model_args={"img_size": 32, "depth": 2}, safe_serialization=True
        )
        return
    tower(name).save_pretrained(folder)
    processor().save_pretrained(folder)


@pytest.mark.parametrize("name", ["timm", "vit", "clip"])
@pytest.mark.parametrize("loadable", ["any", "plain"])
def test_a_pruned_vision_transformer_is_written_loaded_and_made_again(name, loadable, folder, tmp_path):
    on_disk(name, tmp_path / "model")
    stage = Stage("llm-weights", "wanda", sparsity=0.5, loadable=loadable)
    asked = Recipe(
        ModelSource(str(tmp_path / "model")), (stage,), data=str(folder), limit=6, calibration=3, batch_size=4
    )
    report = execute(asked, QUIET, out=str(tmp_path / "out"))
    assert report["kind"] == ("masked" if loadable == "any" else "plain")
    assert ("accuracy" in report["pruned"]) == (name != "clip")
    assert {"agreement", "flops"} <= report["pruned"].keys()
    again = tprune.load(str(tmp_path / "out"))
    assert all((matrix.read() == 0).double().mean() == 0.5 for matrix in matrices(again))
    execute(read(tmp_path / "out" / "recipe.yaml"), QUIET, out=str(tmp_path / "two"), evaluate=False)
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    stock = (
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        if name == "timm"
        else type(again).from_pretrained(tmp_path / "out").eval()
    )
    assert torch.equal(logits(stock, pixels()), logits(again, pixels()))


def test_by_reference_the_masks_alone_make_the_same_model(folder, tmp_path):
    on_disk("timm", tmp_path / "model")
    asked = Recipe(
        ModelSource(str(tmp_path / "model")),
        (Stage("llm-weights", "magnitude", sparsity=0.5),),
        data=str(folder),
        limit=6,
    )
    execute(asked, QUIET, out=str(tmp_path / "whole"), evaluate=False)
    execute(asked, QUIET, out=str(tmp_path / "small"), evaluate=False, by_reference=True)
    whole, small = (tprune.load(str(tmp_path / name)) for name in ("whole", "small"))
    assert torch.equal(whole(pixels()), small(pixels()))


@pytest.mark.parametrize("method", ["sleb", "bonsai", "flexigpt", "llm-surgeon", "movement", *REFUSED])
def test_methods_for_decoders_of_text_say_what_works(method):
    options = {"fit": "built-in"} if method == "movement" else {}
    with pytest.raises(
        UserError, match="is a vision transformer, and .* choose a method .* wanda.* one of cfsp, flap"
    ):
        prune(classifier(), method, sparsity=0.5, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"length": 32}, "--length 32: images have their own number of tokens"),
        ({"recover": "full"}, "--recover full: .* is a vision transformer"),
    ],
)
def test_options_about_text_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        prune(classifier(), "wanda", sparsity=0.5, **options)


def test_models_of_videos_are_refused():
    with pytest.raises(
        UserError, match="VideoMAEForVideoClassification reads videos, and weights are pruned of"
    ):
        prune(videomae(), "wanda", sparsity=0.5)


def test_gradients_without_classes_are_refused():
    with pytest.raises(UserError, match="gblm reads gradients of a classifier's loss"):
        prune(tiny_vit(), "gblm", sparsity=0.5)


def test_calibration_images_of_a_folder_are_not_those_that_are_measured(folder):
    def places(limit, count, seed=0):
        asked = Recipe(ModelSource("m"), (), data=str(folder), limit=limit, calibration=count, seed=seed)
        return drawn(asked, None, pictures.read, 500, QUIET)[1]

    assert sorted(places(6, 6)) == list(range(6, 12))
    assert places(6, 3) != places(6, 3, seed=1)
    assert sorted(places(None, 128)) == list(range(12))


@pytest.mark.parametrize("name", ["timm", "vit"])
def test_vision_transformers_are_held_in_memory(name, tmp_path):
    on_disk(name, tmp_path / "model")
    asked = Recipe(
        ModelSource(str(tmp_path / "model")),
        (Stage("llm-weights", "wanda", sparsity=0.5),),
        max_memory="1GB",
    )
    with pytest.raises(UserError, match="--max-memory: .* is a vision transformer, which is held in memory"):
        execute(asked, QUIET, out=str(tmp_path / "out"))
