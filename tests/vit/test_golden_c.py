"""Cropr and EET against their authors' own code (see tests/golden/vit/*.json)."""

import json

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import tprune
from tests.conftest import tiny_vit
from tests.golden_values import HERE, golden, under
from tprune.core.budget import Site
from tprune.core.score import cls_times_head_norm
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.tokens import Shape
from tprune.models.anatomy import anatomy
from tprune.models.relaxed import FitDriver


def model_of(told, tensors):
    model = VisionTransformer(**told["settings"]["model"]).eval().requires_grad_(False)
    own = {n: t for n, t in under(tensors, "model.").items() if not n.startswith("cropr.")}
    model.load_state_dict(own)
    return model


def test_eet_keeps_the_authors_patches_in_their_order_and_gives_their_logits():
    tensors, told = golden("vit", "eet")
    model = model_of(told, tensors)
    with tprune.prune(model, "eet") as handle:
        handle.driver.record = True
        logits = model(tensors["image"].float())
        found = handle.driver.trace.reductions
    assert [site for site, _ in found] == [Site(4), Site(8), Site(10)]
    for place, (_, reduction) in enumerate(found):
        kept, expected = reduction.index[:, 1:] - 1, tensors[f"index{place}"]
        assert torch.equal(kept.sort(1).values, expected.sort(1).values)
    # Among few the authors' order is far from ties.
    assert torch.equal(kept, expected)
    assert torch.allclose(logits, tensors["logits"], atol=1e-5)


def test_eet_scores_are_the_authors():
    tensors, told = golden("vit", "eet")
    attention = model_of(told, tensors).blocks[0].attn
    x = tensors["x"]
    query, key, value = attention.qkv(x).unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    rows = (query @ key.transpose(2, 3) / 2).softmax(-1)
    found = cls_times_head_norm(rows[:, :, 0, 1:], (rows @ value)[:, :, 1:])
    assert torch.allclose(found, tensors["score"], atol=1e-6)


def test_eet_with_heads_that_read_equally_much_is_the_mean_over_heads():
    row = torch.rand(2, 3, 5)
    assert torch.allclose(cls_times_head_norm(row, torch.ones(2, 3, 5, 4)), row.mean(1))


def test_eet_keeps_the_papers_counts_at_its_proportions():
    eet, shape = registry.build("eet", "vit"), Shape(12, 196, 1, has_cls=True)
    assert [stage.count for stage in eet.stages(shape, None)] == [98, 49, 12]
    assert eet.stages(shape, 12 / 196) == eet.stages(shape, None)
    with pytest.raises(UserError, match="2 numbers for 3 blocks"):
        registry.build("eet", "vit", {"counts": (98, 49)}).check(shape)


AUTHORS = {
    "mixers.{}.0": "cross_attn.mlp_norm",
    "mixers.{}.1": "cross_attn.mlp.fc1",
    "mixers.{}.3": "cross_attn.mlp.fc2",
    "heads.{}.0": "head.norm",
    "heads.{}.1": "head.head",
}
CASES = json.loads((HERE / "vit" / "cropr.json").read_text())["settings"]["cases"]
every_case = pytest.mark.parametrize("case", CASES)


def cropr(case):
    """The authors' tensors, their model as ours, and cropr with their settings and queries."""
    tensors, told = golden("vit", "cropr")
    ours = {n.removeprefix(f"{case}."): t for n, t in tensors.items()}
    learned = under(ours, "model.cropr.")
    queries = torch.cat([learned[f"{place}.cross_attn.queries"] for place in range(len(learned) // 11)])
    setting = CASES[case]
    given = {"rate": setting["pruning_rate"], "fusion": setting["llf"], "smoothing": 0.0}
    method = registry.build("cropr", "vit", given | {"mlp_ratio": told["settings"]["mlp_ratio"]})
    return ours, model_of(told, ours), method, queries, learned


def fit_of(method, model, queries, learned):
    """Cropr in training with the authors' values."""
    fit = method.fit(anatomy(model).shape, None, 0)
    values = {"queries": queries}
    for name in fit.state_dict():
        if name != "queries":
            stem, kind = name.rsplit(".", 1)
            place = stem.split(".")[1]
            values[name] = learned[f"{place}.{AUTHORS[stem.replace(f'.{place}.', '.{}.', 1)]}.{kind}"]
    fit.load_state_dict(values)
    return fit


@every_case
def test_a_cropr_model_keeps_the_authors_tokens_and_gives_their_logits(case):
    tensors, model, method, queries, _ = cropr(case)
    with tprune.prune(model, "cropr", state={"queries": queries}, **method.settings()) as handle:
        handle.driver.record = True
        logits = model(tensors["image"].float())
        found = handle.driver.trace.reductions
        last = handle.driver.trace.entering[-1]
    for place, (site, reduction) in enumerate(found):
        assert site == Site(place + 1)
        assert torch.equal(reduction.index, tensors[f"kept{place}"])
    assert [reduction.count - 1 for _, reduction in found] == CASES[case]["tokens_left"]
    assert last == (16 if CASES[case]["llf"] else CASES[case]["tokens_left"][-1])
    assert torch.allclose(logits, tensors["logits"], atol=1e-5)


@every_case
def test_a_step_of_cropr_gives_the_authors_losses_and_gradients(case):
    tensors, model, method, queries, learned = cropr(case)
    fit = fit_of(method, model.requires_grad_(True), queries, learned)
    driver = FitDriver(anatomy(model), method, fit, 0)
    losses = fit.losses(model(tensors["image"].float()), tensors["labels"], driver.memory, None)
    sum(losses.values()).backward()
    assert torch.allclose(torch.stack(driver.memory["guesses"]), tensors["guesses"], atol=1e-5)
    assert torch.allclose(torch.stack(list(losses.values())), tensors["losses"], atol=1e-5)
    assert torch.allclose(fit.queries.grad, tensors["query_grad"], atol=1e-5)
    found = dict(model.named_parameters())
    for name, gradient in under(tensors, "grad.").items():
        assert torch.allclose(found[name].grad, gradient, atol=1e-5)
    driver.remove()


def test_the_auxiliary_heads_of_cropr_teach_the_model_nothing():
    tensors, model, method, queries, learned = cropr("fusion")
    fit = fit_of(method, model.requires_grad_(True), queries, learned)
    driver = FitDriver(anatomy(model), method, fit, 0)
    model(tensors["image"].float())
    sum(guess.sum() for guess in driver.memory["guesses"]).backward()
    assert fit.queries.grad.any()
    assert all(parameter.grad is None for parameter in model.parameters())
    driver.remove()


def test_what_cropr_drops_comes_back_as_it_left_before_the_last_block(images):
    model, outputs, entered = tiny_vit(), [], []
    state = registry.build("cropr", "vit").neutral_state(anatomy(model).shape, 0)
    with tprune.prune(model, "cropr", keep=0.7, state=state) as handle:
        handle.driver.record = True
        for block in model.blocks:
            block.register_forward_hook(lambda _, args, out: outputs.append(out))
        block.norm1.register_forward_hook(lambda _, args, out: entered.append(args[0]))
        model(images)
        (_, first), (_, second) = handle.driver.trace.reductions
    expected = outputs[0].clone()
    left = outputs[1]
    expected = expected.scatter(1, first.index.unsqueeze(-1).expand_as(left), left)
    both, rest = first.compose(second).index, outputs[2]
    expected = expected.scatter(1, both.unsqueeze(-1).expand_as(rest), rest)
    assert first.count < 17
    assert second.count < first.count
    assert torch.equal(entered[0], expected)


def test_cropr_keeps_the_papers_counts_and_learns_slower_in_early_blocks():
    method, shape = registry.build("cropr", "vit"), Shape(24, 196, 1, width=24, classes=5, has_cls=True)
    counts = [stage.count for stage in method.stages(shape, None)]
    assert counts == [187 - 8 * place for place in range(22)] + [196]
    model = tiny_vit().requires_grad_(True)
    groups = method.fit(anatomy(model).shape, 0.6, 0).groups(model)
    of = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(of) == sum(len(group["params"]) for group in groups)
    assert of[id(model.cls_token)]["lr"] == pytest.approx(4e-3 * 0.75**5)
    assert of[id(model.blocks[0].attn.qkv.weight)]["lr"] == pytest.approx(4e-3 * 0.75**4)
    assert of[id(model.head.weight)] | {"params": 0} == {"params": 0, "lr": 4e-3, "weight_decay": 0.05}
    assert of[id(model.pos_embed)]["weight_decay"] == of[id(model.head.bias)]["weight_decay"] == 0


def test_cropr_begins_to_drop_slowly_where_the_fit_is_short_and_at_once_as_the_authors_do():
    shape = anatomy(tiny_vit()).shape
    at_once = registry.build("cropr", "vit").fit(shape, 0.6, 0)
    slowly = registry.build("cropr", "vit", {"anneal": 0.5}).fit(shape, 0.6, 0)
    found = [slowly.leaving]
    for done in (0.25, 0.5, 1.0):
        slowly.settle(done)
        found.append(slowly.leaving)
    assert at_once.leaving == 1
    assert found == [0, 0.5, 1, 1]


def test_an_mstm_model_merges_the_authors_patches_and_gives_their_logits():
    tensors, told = golden("vit", "mstm")
    model = model_of(told, tensors)
    with tprune.prune(model, "mstm", ratio=told["settings"]["ratio"]) as handle:
        handle.driver.record = True
        logits = model(tensors["image"].float())
        found = handle.driver.trace.reductions
    assert [site for site, _ in found] == [Site(block, between=True) for block in told["settings"]["blocks"]]
    # Ours keep their order, the authors' stand by rank: the first cut can be compared patch by patch.
    _, first = found[0]
    kept, ranked = first.index[:, 1:] - 1, tensors["crucial0"]
    assert torch.equal(kept, ranked.sort(1).values)
    assert torch.equal(first.source - 1, tensors["other0"])
    assert torch.equal(kept.gather(1, first.into - 1), ranked.gather(1, tensors["into0"]))
    assert torch.allclose(logits, tensors["logits"], atol=1e-4)
