"""What methods do while they are fitted, and with what they learned, against their authors' own code."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import tprune
from tests.golden_values import golden, under
from tprune.methods import registry
from tprune.methods.vit._eet_fit import class_codes, hide
from tprune.models.anatomy import anatomy
from tprune.models.relaxed import FitDriver


def test_ltmp_training_block_gives_the_authors_outputs_and_gradients():
    tensors, told = golden("vit", "ltmp")
    setting = told["settings"]["relaxed"]
    model = VisionTransformer(**told["settings"]["model"]).eval().requires_grad_(False)
    model.load_state_dict(under(tensors, "model."))
    chosen = {name: setting[name] for name in ("merge_threshold", "prune_threshold")}
    method = registry.build("ltmp", "vit", chosen | {"temperature": setting["tau"]})
    parts = anatomy(model)
    fit = method.fit(parts.shape, 0.5, 0)
    driver = FitDriver(parts, method, fit, 0)
    driver._begin(None, (tensors["relaxed.x"],), {})
    driver.present, driver.size = tensors["relaxed.mask"].float(), tensors["relaxed.size"].float()
    out = model.blocks[0](tensors["relaxed.x"].float())
    assert torch.allclose(out, tensors["relaxed.out"], atol=1e-5)
    assert torch.allclose(driver.size, tensors["relaxed.size_out"], atol=1e-6)
    assert torch.equal(driver.present, tensors["relaxed.mask_out"])
    (driver.present * tensors["relaxed.weight"]).sum().backward()
    found = torch.stack([fit.merge_threshold.grad[0], fit.prune_threshold.grad[0]])
    assert torch.allclose(found, tensors["relaxed.grad"], rtol=1e-4)


def tnt_model():
    tensors, told = golden("vit", "tnt")
    model = VisionTransformer(**told["settings"]["model"]).eval().requires_grad_(False)
    model.load_state_dict(under(tensors, "model."))
    return model, tensors, {"heads": tensors["heads"].float()}


def test_tnt_in_training_gives_the_authors_logits(monkeypatch):
    model, tensors, state = tnt_model()
    parts, method = anatomy(model), registry.build("tnt", "vit")
    fit = method.fit(parts.shape, None, 0)
    fit.heads.data.copy_(state["heads"])
    fit.generator, noise = None, iter(tensors["train.noise"])
    monkeypatch.setattr(torch, "randn", lambda *_, **__: next(noise))
    driver = FitDriver(parts, method, fit, 0)
    assert torch.allclose(model(tensors["image"].float()), tensors["train.logits"], atol=1e-4)
    driver.remove()


TNT_CASES = {
    "sequential": {"partition": "sequential"},
    "random": {},
    "several": {"layers": (2, 3, 4), "rate": 0.8},
}


@pytest.mark.parametrize("case", TNT_CASES)
def test_a_tnt_model_gives_the_authors_logits(case, monkeypatch):
    model, tensors, state = tnt_model()
    if case != "sequential":
        order = tensors[f"{case}.order"]
        middle = len(order) // 2

        def halves(method, ranked, seeds):
            return ranked[:, order[:middle]], ranked[:, order[middle:]]

        monkeypatch.setattr(registry.load("tnt", "vit"), "halves", halves)
    with tprune.prune(model, "tnt", state=state, similar=37, **TNT_CASES[case]):
        logits = model(tensors["image"].float())
    assert torch.allclose(logits, tensors[f"{case}.logits"], atol=1e-4)


def test_diffrate_in_training_gives_the_authors_logits_and_gradients():
    tensors, told = golden("vit", "diffrate-fit")
    model = VisionTransformer(**told["settings"]["model"]).eval().requires_grad_(False)
    model.load_state_dict(under(tensors, "model."))
    parts = anatomy(model)
    method = registry.build("diffrate", "vit", {"granularity": told["settings"]["granularity"]})
    fit = method.fit(parts.shape, 0.5, 0)
    fit.logits.data.copy_(tensors["fit.logits"])
    driver = FitDriver(parts, method, fit, 0)
    out = model(tensors["fit.image"].float())
    assert torch.allclose(out, tensors["fit.out"], atol=1e-4)
    assert torch.allclose(driver.present, tensors["fit.mask"], atol=1e-6)
    assert torch.allclose(driver.size, tensors["fit.size"], rtol=1e-3)
    (out * tensors["fit.weight"]).sum().backward()
    assert torch.allclose(fit.logits.grad, tensors["fit.grad"], rtol=1e-3, atol=1e-5)
    driver.remove()


def test_eet_in_training_gives_the_authors_losses_and_gradients():
    tensors, told = golden("vit", "eet-fit")
    setting, (images, model_told) = told["settings"], golden("vit", "eet")
    model = VisionTransformer(**model_told["settings"]["model"]).eval()
    model.load_state_dict(under(images, "model."))
    parts = anatomy(model)
    method = registry.build("eet", "vit", {name: setting[name] for name in ("bits", "hidden")})
    fit = method.fit(parts.shape, None, 0)
    for name, head in (("head", fit.head), ("teacher", fit.teacher)):
        head.load_state_dict({part: tensors[f"{name}.{part}"] for part in ("weight", "bias")})
    fit.codes[tensors["labels"]] = tensors["target"]
    driver = FitDriver(parts, method, fit, 0)
    pixels = images["image"].float()
    outputs = model(pixels)
    losses = fit.losses(outputs, tensors["labels"], {"inputs": pixels, "again": model}, None)
    driver.remove()
    assert torch.equal(
        hide(torch.ones_like(pixels), fit.attended, 4, (14, 14))[:, :1] == 0, tensors["hidden"]
    )
    for name, expected in setting["losses"].items():
        assert abs(losses[name].item() - expected) < 1e-5
    sum(losses.values()).backward()
    found = {"grad": model.blocks[2].attn.qkv.weight, "head.grad": fit.head.weight}
    found["teacher.grad"] = fit.teacher.weight
    for name, parameter in found.items():
        assert torch.allclose(parameter.grad, tensors[name], rtol=1e-3, atol=1e-6)


def test_eet_codes_are_the_authors():
    tensors, _ = golden("vit", "eet-fit")
    classes = torch.nn.functional.one_hot(tensors["codes.labels"]).double().T
    found = class_codes(classes, tensors["codes.values"], tensors["codes.signs"])
    assert torch.equal(found, tensors["codes"].double())
