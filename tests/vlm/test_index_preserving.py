"""Tokens that leave before the vision tower by their pixels."""

import pytest
import torch
from torch.nn import functional

import tprune
from tests.golden_values import golden, under
from tests.vlm.test_fit import course
from tests.vlm.tiny import start, tiny
from tprune.core import grid
from tprune.core.budget import PROJECTOR
from tprune.methods import registry
from tprune.methods.token_view import TokenView
from tprune.methods.tokens import Shape
from tprune.methods.vlm.index_preserving import classified
from tprune.models.encoder import Sight
from tprune.models.prompts import noise_prompts
from tprune.models.signals import attention_of
from tprune.models.taps import Tap


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def placed(tensors):
    """The tiny Qwen2.5-VL, and the authors' classifier at work in it."""
    model = tiny("qwen2.5-vl")
    return model, tprune.prune(model, "vlm/index-preserving", state=under(tensors, "state."))


def features(model, pixels, size):
    return model.model.get_image_features(pixel_values=pixels, image_grid_thw=size)


def test_the_authors_tokens_stay_in_the_authors_windows():
    tensors, _ = golden("vlm", "index-preserving")
    pixels, size = tensors["pixels"], tensors["grid"]
    model, handle = placed(tensors)
    with handle:
        projector, seams = handle.projector, []
        hooks = [
            block.register_forward_pre_hook(
                lambda block, args, kwargs: seams.append(
                    (len(args[0]), kwargs["cu_seqlens"], projector.inside.kept)
                ),
                with_kwargs=True,
            )
            for block in model.model.visual.blocks
        ]
        features(model, pixels, size)
        for hook in hooks:
            hook.remove()
        sight = Sight(projector.parts, {"image_grid_thw": size, "pixel_values": pixels})
        found = sight.order.argsort()[seams[0][2]]
        image = projector.views.of_pixels(sight, projector.inside._units(sight, [0]))
        seen = image.signal("pixels")
    expected = tensors["window_index"].unsqueeze(1) * 4 + torch.arange(4)
    assert torch.equal(found, expected.flatten())
    assert torch.equal(found.view(-1, 4)[:, 0].div(4, rounding_mode="floor").sort().values, tensors["kept"])
    own = 4 * int((tensors["kept"] < 30).sum())
    for block, (length, found, _) in enumerate(seams):
        assert length == len(expected.flatten())
        assert found.tolist() == ([0, own, length] if block == 1 else tensors["window_seams"].tolist())
    # Theirs count the first patch of the second image to the first, which is told in the paper's notes.
    assert tensors["full_seams"].tolist() == [0, own + 1, length]
    scores = classified(seen, under(tensors, "state."))
    assert torch.allclose(scores[0], tensors["scores"][: 2 * scores.shape[1] : 2, 0], atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2-vl", "qwen2.5-vl"])
def test_the_tower_works_on_what_is_left_as_if_nothing_saw_the_rest(kind):
    model = tiny(kind)
    inputs = noise_prompts(model, 2, 3)
    pixels, size = inputs["pixel_values"], inputs["image_grid_thw"]
    blocks, found = model.model.visual.blocks, []
    keep = blocks[-1].register_forward_hook(lambda block, args, output: found.append(output))
    with tprune.prune(model, "vlm/index-preserving", **start("index-preserving", model), keep=0.5) as handle:
        inside, left = handle.projector.inside, []
        note = blocks[0].register_forward_hook(lambda block, args, output: left.append(inside.kept))
        features(model, pixels, size)
        note.remove()
        kept, length = left[0], len(found[0])
        # A tower that is called by itself is whole.
        whole = model.model.visual(pixels, size).pooler_output
    seen = torch.zeros(length, dtype=torch.bool).index_fill(0, kept, True)
    begins = {attention_of(block): 0 for block in blocks}

    def hide(call):
        first = begins[call.module] % length
        begins[call.module] += call.key.shape[2]
        shown = seen[first : first + call.key.shape[2]]
        # Windows without any are none of our business.
        shown = shown if shown.any() else ~shown
        return call.attend(call.query, call.key, call.value, shown.expand(1, 1, call.query.shape[2], -1))

    with Tap(begins, hide):
        features(model, pixels, size)
    keep.remove()
    assert 0 < len(kept) < length
    assert torch.allclose(found[0][kept], found[2][kept], atol=1e-4)
    assert torch.equal(whole, model.model.visual(pixels, size).pooler_output)


def test_what_is_next_to_something_stays_and_one_token_at_least(monkeypatch):
    method = registry.build("index-preserving", "vlm", {"threshold": 0.5})
    logit = torch.full((2, 1, 20), -1.0)
    logit[0, 0, 7] = 1.0
    logit[1, 0, 3] = -0.5
    there = torch.ones(2, 20, dtype=torch.bool)
    view = TokenView(
        there.unsqueeze(2), there, grid=(4, 5), signals={"pixels": lambda: there[..., None, None, None]}
    )
    monkeypatch.setattr("tprune.methods.vlm.index_preserving.classified", lambda pixels, state: logit[:, 0])
    kept = method.reduce(PROJECTOR, view, 20, {})
    rows = [kept.index[row][kept.valid[row]].tolist() for row in range(2)]
    assert rows[0] == [1, 2, 3, 6, 7, 8, 11, 12, 13]
    assert len(rows[1]) == 1
    assert rows[1][0] in (2, 3, 4, 7, 8, 9)


def test_a_fit_runs_no_layer_of_the_decoder():
    found, (inputs, _) = course("index-preserving")
    method = registry.build("index-preserving", "vlm", {"features": 4})
    fit = method.fit(found.shape, None, 0)
    training = found.driver(method, fit, 0)
    ran = []
    hook = training.driver.layers[0].register_forward_hook(lambda *call: ran.append(call))
    assert found.outputs(inputs) is None
    assert not ran
    assert training.memory["seen"]
    with training.away():
        assert found.outputs(inputs) is not None
    hook.remove()
    training.remove()


def test_foreground_and_background_weigh_the_same():
    method = registry.build("index-preserving", "vlm", {"features": 4})
    fit = method.fit(Shape(4, 12, patch=(3, 2, 2)), None, 0)
    pixels = torch.randn(2, 12, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    there, rows = torch.ones(2, 12, dtype=torch.bool), torch.tensor([1, 0])
    view = TokenView(there.unsqueeze(2), there, grid=(3, 4))
    view.signals = {"pixels": lambda: pixels, "rows": lambda: rows}
    boxes = torch.tensor([[[0.0, 0.0, 0.3, 0.3]], [[0.5, 0.5, 1.0, 1.0]]])
    memory = {"inputs": {"boxes": boxes}}
    assert fit.at(PROJECTOR, view, memory).count == 12
    found = fit.losses(None, None, memory, None)["foreground"]
    logit, sides = classified(pixels, fit.state()), ([], [])
    wanted = {1: [(0, 0), (0, 1)], 0: [(row, column) for row in (1, 2) for column in (2, 3)]}
    for image in range(2):
        for place in range(12):
            inside = divmod(place, 4) in wanted[image]
            sides[inside].append(functional.softplus(-logit[image, place] if inside else logit[image, place]))
    assert torch.allclose(found, sum(torch.stack(side).mean() for side in sides) / 2, atol=1e-6)


def test_the_best_of_a_neighbourhood_is_that_of_its_cells():
    score = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    found = grid.best_near(score, (3, 4), 1)
    for place in range(12):
        row, column = divmod(place, 4)
        near = [4 * y + x for y in range(3) for x in range(4) if abs(y - row) <= 1 and abs(x - column) <= 1]
        assert torch.equal(found[:, place], score[:, near].amax(1))


def test_text_begins_behind_the_largest_position_that_is_left_of_the_image_before_it():
    model = tiny("qwen2.5-vl")
    inputs = noise_prompts(model, 2, 6, images=2)
    given = []
    core = model.model.language_model
    rotary = core.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs.get("position_ids", args[-1])), with_kwargs=True
    )
    model(**inputs)
    with tprune.prune(model, "vlm/index-preserving", **start("index-preserving", model), keep=0.03) as handle:
        cache = model(**inputs, use_cache=True).past_key_values
        owner = handle.driver.tally.owner
        model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache, use_cache=True)
    rotary.remove()
    dense, found, behind = given
    image = inputs["input_ids"] == model.config.image_token_id
    moved_any = False
    for row in range(2):
        moved, expected, last = 0, [], None
        for place in range(image.shape[1]):
            kept = owner[row, place] >= 0
            if image[row, place]:
                if place == 0 or not image[row, place - 1]:
                    largest, whole = 0, 0
                whole = max(whole, int(dense[:, row, place].max()))
                largest = max(largest, int(dense[:, row, place].max())) if kept else largest
                last = place
            elif last is not None and last == place - 1:
                moved += whole - largest
                moved_any |= whole > largest
            if kept:
                expected.append(dense[:, row, place] - moved)
        assert torch.equal(found[:, row], torch.stack(expected, 1))
        assert torch.equal(behind[:, row, 0], found[:, row, -1] + 1)
    assert moved_any
