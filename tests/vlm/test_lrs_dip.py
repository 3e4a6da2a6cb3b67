"""Copies of a decoder's layers, and how LRS-VQA's pruning goes from coarse to fine with them."""

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

import tprune
from tests.golden_values import golden
from tests.vlm.test_gains import learn
from tests.vlm.tiny import IMAGE, start, tiny
from tprune.core import grid
from tprune.core.budget import Site
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.token_view import TokenView
from tprune.methods.tokens import Shape
from tprune.models.copies import Copies
from tprune.models.layout import crop_table, newlines, units
from tprune.models.prompts import noise_prompts
from tprune.models.run import Run
from tprune.models.taps import Capture
from tprune.models.track import Track

TENSORS, TOLD = golden("vlm", "lrs-dip")
LOCAL, IMAGES = slice(7, 27), slice(3, 27)


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


def llama(layers=3):
    return LlamaModel(
        LlamaConfig(
            vocab_size=8,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()


def copies_of(core, embeds):
    """Copies that read `embeds` [B, N, D], and what the decoder's own attention was."""
    given, batch, length = {}, *embeds.shape[:2]
    hook = core.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: given.update(kwargs, hidden_states=args[0]), with_kwargs=True
    )
    capture = Capture([layer.self_attn for layer in core.layers])
    core(inputs_embeds=embeds, use_cache=False)
    calls = [capture.calls[layer.self_attn][0] for layer in core.layers]
    capture.remove()
    hook.remove()
    everything = torch.ones(batch, length, dtype=torch.bool)
    run = Run({}, Track(length, everything.sum(1)), 0, length, everything, everything)
    return Copies(core, core.layers, run, given), calls


def golden_view():
    """The recorded prompt before the first layer, and what the module learned."""
    copies, _ = copies_of(llama(), TENSORS["embeds"])
    image = torch.zeros(1, 30, dtype=torch.bool)
    image[:, IMAGES] = True
    view = TokenView(TENSORS["embeds"], image, depth=3, whole=False, real=torch.ones_like(image))
    view.signals["copies"] = lambda: copies
    weights = {n.removeprefix("state."): t for n, t in TENSORS.items() if n.startswith("state.")}
    return view, {"layers": torch.arange(3), **weights}


@pytest.mark.parametrize("case", ["whole", "some"])
def test_scores_are_those_of_the_authors_copies_whether_or_not_tiles_are_read(case, no_gradients):
    view, state = golden_view()
    method = registry.build("lrs-dip", "vlm").bind(state)
    local = torch.zeros_like(view.prunable)
    local[:, LOCAL] = TENSORS["mask"] if case == "some" else True
    part = ~view.prunable | local
    part[:, 3:7] = True
    found = method.focus(view, part, local, "original")[0, LOCAL]
    assert torch.allclose(found, TENSORS[case], atol=1e-5)


@pytest.mark.parametrize("read", ["some", "whole"])
def test_what_stays_of_tiles_is_what_the_authors_keep(read):
    score = TENSORS[read][None]
    local = TENSORS["mask"][None] if read == "some" else torch.ones(1, 20, dtype=torch.bool)
    ends = torch.arange(20)[None] % 5 == 4
    suffix = "" if read == "some" else "_all"
    for name, values in (
        ("ratio", TOLD["settings"]["ratios"]),
        ("threshold", TOLD["settings"]["thresholds"]),
    ):
        for value in values:
            method = registry.build("lrs-dip", "vlm", {name: value})
            kept = (method.chosen(score, local) | ends)[0].nonzero().flatten()
            assert torch.equal(kept, TENSORS[f"{name}{suffix}.{value}"])


def mosaic(rows, columns, side=6):
    """The cells of an image as a whole, and of all its tiles, row by row; and the table of its crops."""
    place = torch.arange(side**2)
    cells = torch.stack([place * 0, place // side, place % side], 1)
    tiles = torch.cat([cells + torch.tensor([tile, 0, 0]) for tile in range(1, rows * columns + 1)])
    crops = [[0, -1, -1], *([0, row, column] for row in range(rows) for column in range(columns))]
    return torch.cat([cells, tiles])[None], torch.tensor(crops)


@pytest.mark.parametrize("case", ["a", "b"])
def test_tiles_are_called_as_the_authors_call_them(case):
    rows, columns = TOLD["settings"]["grids"][case]
    cells, crops = mosaic(rows, columns)
    votes = torch.zeros(cells.shape[:2], dtype=torch.bool)
    votes[0, TENSORS[f"votes.{case}"]] = True
    called = grid.voted_tiles(cells, crops, votes)[0].view(-1, 36)
    assert torch.equal(called.all(1), called.any(1))
    assert torch.equal(crops[called.all(1)][:, 1:], TENSORS[f"tiles.{case}"])


def test_votes_go_to_the_tiles_of_their_own_image_where_padding_is_cut_off_and_elsewhere():
    cells, crops = mosaic(2, 1)
    # Of the first image, three rows above and below are padding: the whole shows rows 3 to 8 of 12.
    padding = (cells[..., 0] == 1) & (cells[..., 1] < 3) | (cells[..., 0] == 2) & (cells[..., 1] >= 3)
    first = cells.masked_fill(padding.unsqueeze(2), -1)
    second = cells + torch.tensor([3, 0, 0])
    both = torch.cat([first, second], 1)
    table = torch.cat([crops, crops + torch.tensor([1, 0, 0])])
    votes = torch.zeros(both.shape[:2], dtype=torch.bool)
    votes[0, [2 * 6, 108 + 2 * 6 + 5, 108 + 3 * 6]] = True
    called = grid.voted_tiles(both, table, votes)
    assert [bool(called[both[..., 0] == crop].all()) for crop in range(6)] == [
        False,
        True,
        False,
        False,
        True,
        True,
    ]
    assert not called[both[..., 0] < 0].any()


def test_copies_of_consecutive_layers_attend_as_the_decoder_does(no_gradients):
    torch.manual_seed(0)
    core = llama(4)
    copies, calls = copies_of(core, torch.randn(2, 9, 16))
    found = copies.read([0, 1, 2, 3], {})
    assert len(found) == 3
    for attention, call in zip(found, calls[1:], strict=True):
        assert torch.allclose(attention.rows(), call.view().rows(), atol=1e-6)
    # Without the first half, renumbered, as if it had never been there.
    part = torch.arange(4, 9).expand(2, -1), None
    shorter, _ = copies_of(core, copies.given["hidden_states"][:, 4:])
    apart = copies.read([0, 2, 3], {}, part, "compact")[-1].rows()
    assert torch.allclose(apart, shorter.read([0, 2, 3], {})[-1].rows(), atol=1e-6)
    with pytest.raises(
        UserError, match="layer 0 of this decoder, LlamaDecoderLayer, cannot be copied with these"
    ):
        copies.read([0, 1], {"0.other": torch.zeros(1)})


def test_the_tiles_of_an_image_are_where_it_was_cut():
    model = tiny("llava-next")
    sizes = torch.tensor([[32, 64], [64, 64]])
    packed = noise_prompts(model, 1, 0)
    pixels = torch.zeros(2, 5, 3, 32, 32)
    with torch.no_grad():
        lengths = [len(one) for one in model.model.get_image_features(pixels, sizes).pooler_output]
    ids = torch.cat([packed["input_ids"][0, :4], torch.full((sum(lengths),), IMAGE)])[None]
    inputs = {"input_ids": ids, "image_sizes": sizes, "pixel_values": pixels}
    found = units(model.model, model.config, inputs, ids == IMAGE, by_crop=True)
    wide, square = (
        [[0, -1, -1], [0, 0, 0], [0, 0, 1]],
        [[1, -1, -1], [1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]],
    )
    assert crop_table(model.model, model.config, inputs, found).tolist() == wide + square
    # A newline ends every row of cells: four of the first image, eight of the second.
    assert int(newlines(found, ids == IMAGE).sum()) == 4 + 8
    single = tiny("llava")
    inputs = noise_prompts(single, 2, 0)
    found = units(single.model, single.config, inputs, inputs["input_ids"] == IMAGE, by_crop=True)
    assert crop_table(single.model, single.config, inputs, found).tolist() == [[0, -1, -1], [1, -1, -1]]


def kept(model, inputs, **settings):
    """Which tokens of the first prompt enter the first layer, and their cells and newlines."""
    seen = {}
    method = registry.load("lrs-dip", "vlm")
    plain = method.reduce

    def watched(self, site, view, count, memory):
        seen["cells"], (seen["crops"], seen["between"]) = view.signal("cells")[0], view.signal("crops")
        return plain(self, site, view, count, memory)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(method, "reduce", watched)
        with tprune.prune(model, "vlm/lrs-dip", **start("lrs-dip", model), **settings) as handle:
            model(**inputs)
            owner = handle.driver.tally.owner[0]
    return owner >= 0, seen["cells"], seen["crops"], seen["between"][0]


def test_the_whole_and_the_ends_of_rows_stay_and_no_token_of_a_tile_that_nobody_asked_for():
    model = tiny("llava-next")
    inputs = noise_prompts(model, 1, 0)
    stays, cells, crops, between = kept(model, inputs, ratio=0.07)
    whole = cells[:, 0] == 0
    assert stays[whole].all()
    assert stays[between].all()
    # One of the 16 coarse tokens votes: one tile of the two is read, of it and the row ends int(0.07 · 20) token stays.
    tiles = [int(stays[cells[:, 0] == crop].sum()) for crop in (1, 2)]
    assert min(tiles) == 0
    assert max(tiles) <= 1
    assert crops.tolist() == [[0, -1, -1], [0, 0, 0], [0, 0, 1]]


def test_with_a_budget_tiles_that_were_asked_for_come_before_others():
    model = tiny("llava-next")
    inputs = noise_prompts(model, 1, 0)
    total = int((inputs["input_ids"] == IMAGE).sum())
    for count in (10, 19, 28, 38, total):
        stays, cells, _, between = kept(model, inputs, ratio=0.07, keep=count / total)
        numbers = [int(stays[cells[:, 0] == crop].sum()) for crop in range(3)]
        ends = int(stays[between].sum())
        assert numbers[0] + numbers[1] + numbers[2] + ends == count
        assert numbers[0] == min(count, 16)
        assert ends == min(4, count - numbers[0])
        assert min(numbers[1:]) == max(0, count - 36)


def test_one_level_keeps_its_share():
    model = tiny("llava")
    stays, *_ = kept(model, noise_prompts(model, 1, 0))
    assert int(stays.sum()) == noise_prompts(model, 1, 0)["input_ids"].shape[1] - 16 + 4


def test_copies_learn_what_their_layers_attend_to():
    torch.manual_seed(0)
    core = llama(4).requires_grad_(False)
    for parameter in core.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.3)
    method = registry.build("lrs-dip", "vlm", {"layers": "24"})
    fit = method.fit(Shape(4, 9, heads=4, width=16), None, 0)

    def forward(seed):
        embeds = torch.randn(8, 12, 16, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            copies, calls = copies_of(core, embeds)
        image = torch.zeros(8, 12, dtype=torch.bool)
        image[:, 2:11] = True
        view = TokenView(embeds, image, depth=4, whole=False)
        view.signals["copies"] = lambda: copies
        memory = {"attention": {place: call.view().rows() for place, call in enumerate(calls)}}
        assert fit.at(Site(0), view, memory).count == 12
        return memory

    fit.begin(iter([forward(0)]))

    def lesson(step):
        return fit.losses(None, None, forward(step % 4), None)

    told = learn(fit, lesson, 30)
    assert told[-1] < told[0] - 0.02
