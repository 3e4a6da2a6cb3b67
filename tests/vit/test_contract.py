"""What every method of the family must do, run over whatever files there are."""

import pytest
import torch

import tprune
from tests.conftest import start, tiny_vit
from tprune.errors import UserError
from tprune.methods import registry
from tprune.models.anatomy import anatomy
from tprune.pipelines.run import execute
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe, Stage

METHODS = registry.running_on("plain")
KINDS = {
    "cls": {},
    "registers": {"reg_tokens": 3},
    "average": {"class_token": False, "global_pool": "avg"},
    "layerscale and qk norm": {"init_values": 0.1, "qk_norm": True},
}
every_method = pytest.mark.parametrize("method", METHODS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def fitting(method, kind):
    """The tiny model of a kind; None where the method says that it does not fit."""
    model = tiny_vit(**KINDS[kind])
    try:
        registry.build(method, "vit").check(anatomy(model).shape)
    except UserError:
        return None
    return model


@every_method
@every_kind
def test_keeping_all_is_bitwise_the_dense_model(method, kind, images):
    model = fitting(method, kind)
    if model is None:
        return
    dense = model(images)
    with tprune.prune(model, f"vit/{method}", keep=1.0, **start(method, model)) as handle:
        assert torch.equal(model(images), dense)
        assert handle.achieved().value == 1.0


@every_method
@every_kind
def test_counts_are_exactly_the_planned_ones_and_the_model_is_restored(method, kind, images):
    model = fitting(method, kind)
    if model is None:
        return
    dense, before = model(images), set(vars(model.blocks[0]))
    with tprune.prune(model, f"vit/{method}", keep=0.6, **start(method, model)) as handle:
        pruned = model(images)
        driver = handle.driver
        assert driver.trace.entering == driver.entering[::2]
        assert abs(handle.achieved().value - 0.6) < 0.06
    assert not torch.equal(pruned, dense)
    assert torch.equal(model(images), dense)
    assert set(vars(model.blocks[0])) == before


@every_method
def test_a_batch_equals_its_samples(method, vit, images):
    with tprune.prune(vit, f"vit/{method}", keep=0.6, **start(method, vit)):
        together = vit(images)
        alone = torch.cat([vit(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-5)


@every_method
def test_prefix_tokens_are_neither_dropped_nor_merged_away(method, images):
    model = tiny_vit(reg_tokens=3)
    with tprune.prune(model, f"vit/{method}", keep=0.6, **start(method, model)) as handle:
        handle.driver.record = True
        model(images)
        for _, reduction in handle.driver.trace.reductions:
            head = torch.arange(4).expand(len(images), 4)
            assert torch.equal(reduction.index[:, :4], head)
            if reduction.source is not None and reduction.source.numel():
                assert reduction.source.min() >= 4
                apart = torch.eye(4).expand(len(images), 4, 4)
                if reduction.into is None:
                    assert torch.equal(reduction.matrix()[:, :4, :4], apart)
                    assert not reduction.matrix()[:, :4, 4:].any()
                elif (reduction.into >= 0).any():
                    assert reduction.into[reduction.into >= 0].min() >= 4


@every_method
def test_the_same_seed_gives_the_same_outputs(method, vit, images):
    outputs = []
    for _ in range(2):
        with tprune.prune(vit, f"vit/{method}", keep=0.6, seed=3, **start(method, vit)):
            outputs.append(vit(images))
    assert torch.equal(*outputs)


@every_method
def test_a_half_precision_model_works_in_its_own_precision(method, images):
    model = tiny_vit().bfloat16()
    with tprune.prune(model, f"vit/{method}", keep=0.6, **start(method, model)):
        assert model(images.bfloat16()).dtype == torch.bfloat16


@every_method
def test_a_budget_that_rounds_to_nothing_is_refused(method, vit):
    with pytest.raises(UserError, match="rounds to keeping all"):
        tprune.prune(vit, f"vit/{method}", keep=0.9999, **start(method, vit))


@every_method
def test_the_paper_settings_run_without_a_budget(method, vit, images):
    with tprune.prune(vit, f"vit/{method}", **start(method, vit)) as handle:
        vit(images)
        # What the data decides may be nothing on random weights.
        assert 0 < handle.achieved().value <= (1 if handle.driver.method.varies() else 1 - 1e-9)


def test_random_cannot_keep_less_than_its_stages_allow(vit):
    with pytest.raises(UserError, match=r"reaches 0\.\d+ to 1"):
        tprune.prune(vit, "vit/random", keep=0.05)


def test_random_draws_differ_within_a_batch_and_between_seeds(vit, images):
    kept = []
    for seed in (0, 1):
        with tprune.prune(vit, "vit/random", keep=0.5, seed=seed) as handle:
            handle.driver.record = True
            vit(images)
            kept.append(handle.driver.trace.reductions[0][1].index)
    assert not torch.equal(kept[0][0], kept[0][1])
    assert not torch.equal(kept[0], kept[1])


def test_evit_refuses_a_model_without_class_token():
    with pytest.raises(UserError, match="class token"):
        tprune.prune(tiny_vit(class_token=False, global_pool="avg"), "vit/evit", keep=0.6)


def test_swin_is_refused_by_name():
    import timm

    model = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, depths=(1, 1, 1, 1))
    with pytest.raises(UserError, match="SwinTransformer attends within fixed windows"):
        tprune.prune(model, "vit/tome", keep=0.6)


def test_images_of_another_size_are_refused():
    model = tiny_vit(dynamic_img_size=True)
    with tprune.prune(model, "vit/tome", keep=0.6):
        with pytest.raises(UserError, match="planned for 16"):
            model(torch.zeros(1, 3, 16, 16))


def test_a_second_method_is_refused_until_the_first_is_removed(vit, images):
    dense = vit(images)
    first = tprune.prune(vit, "vit/tome", keep=0.6)
    with pytest.raises(UserError, match=r"tome is at work in this model; remove\(\) its handle before evit"):
        tprune.prune(vit, "vit/evit", keep=0.6)
    first.remove()
    with tprune.prune(vit, "vit/evit", keep=0.6):
        assert not torch.equal(vit(images), dense)
    assert torch.equal(vit(images), dense)


def test_a_model_is_as_it_was_after_a_method_that_could_not_be_put_in_place(images):
    from timm.models.vision_transformer import ResPostBlock

    model = tiny_vit(block_fn=ResPostBlock)
    dense = model(images)
    with pytest.raises(UserError, match="is no pre-norm block"):
        tprune.prune(model, "vit/tome", keep=0.6)
    assert torch.equal(model(images), dense)
    with tprune.prune(model, "vit/random", keep=0.6):
        assert not torch.equal(model(images), dense)


def test_a_recipe_with_two_methods_is_refused_before_a_model_is_loaded():
    stages = tuple(Stage("vit", name, keep=0.6) for name in ("tome", "evit"))
    with pytest.raises(UserError, match="keep one of tome, evit"):
        execute(Recipe(ModelSource("no-such-model"), stages), Progress(quiet=True))


def test_weights_and_tokens_of_one_model_are_pruned_by_one_recipe(images):
    model = tiny_vit()
    with tprune.prune(model, "vit/tome", keep=0.6):
        tokens = model(images)
        tprune.prune(model, "llm-weights/magnitude", sparsity=0.5)
        both = model(images)
    assert not torch.equal(both, tokens)
    assert not torch.equal(model(images), both)
