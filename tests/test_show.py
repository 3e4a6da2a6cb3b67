"""`tprune show`: pictures of what methods did."""

import io
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import tprune
from tests.conftest import tiny_vit
from tests.test_cli import call, prune
from tests.vlm.tiny import KINDS, tiny
from tprune.core.budget import Site, Stage
from tprune.core.reduction import Reduction, follow_all
from tprune.errors import UserError
from tprune.evaluate.pictures import Panel, draw_patches, enlarge, fit, patches
from tprune.methods.tokens import TokenMethod
from tprune.models.prompts import noise_prompts
from tprune.models.source import Source
from tprune.models.subject import Subject
from tprune.models.vlm import image_tokens
from tprune.pipelines.base import Sample
from tprune.pipelines.pictures import on_grid, panels
from tprune.pipelines.run import execute
from tprune.pipelines.vit import VitPipeline
from tprune.pipelines.vlm_pictures import crops
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe
from tprune.recipe import Stage as RecipeStage

GRID = (3, 4)


def gray(rows=24, columns=32):
    """An image whose every pixel is a shade of its own row and column."""
    across = np.add.outer(np.arange(rows), np.arange(columns))[..., None]
    return (40 + across).repeat(3, axis=2).astype(np.uint8)


def dimmed(image, drawn):
    """Which patches of 8 by 8 pixels were blended towards gray."""
    expected = np.round(0.75 * 128 + 0.25 * image.astype(float)).astype(np.uint8)
    return {
        (row, column)
        for row in range(GRID[0])
        for column in range(GRID[1])
        if (drawn == expected)[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].all()
    }


def test_a_known_reduction_dims_exactly_the_patches_that_left():
    image, prefix = gray(), 1
    kept = [place for place in range(12) if place not in (1, 6, 11)]
    index = torch.tensor([[0, *(prefix + place for place in kept)]])
    stands = follow_all([Reduction.keep(index, 13)])[0][0]
    drawn = draw_patches(image, on_grid(stands, prefix + torch.arange(12)), GRID)
    gone = {(0, 1), (1, 2), (2, 3)}
    assert dimmed(image, drawn) == gone
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            if (row, column) not in gone:
                patch = np.s_[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
                assert (drawn[patch] == image[patch]).all()


def test_tokens_stay_followed_when_a_method_changes_their_order():
    first = Reduction.keep(torch.tensor([[4, 2, 0, 1]]), 5)
    second = Reduction.keep(torch.tensor([[1, 3]]), 4)
    after_first, after_second = follow_all([first, second])
    assert after_first.tolist() == [[0, 1, 2, -1, 4]]
    assert after_second.tolist() == [[-1, 1, 2, -1, -1]]


def test_merges_are_followed_through_further_merges_and_drops():
    first = Reduction.merge(torch.tensor([[0, 2, 3, 4]]), 5, torch.tensor([[1]]), torch.tensor([[1]]))
    second = Reduction.merge(torch.tensor([[0, 3]]), 4, torch.tensor([[1]]), torch.tensor([[1]]))
    third = Reduction.keep(torch.tensor([[0]]), 2)
    stands = [one.tolist() for one in follow_all([first, second, third])]
    assert stands == [[[0, 2, 2, 3, 4]], [[0, 4, 4, -1, 4]], [[0, -1, -1, -1, -1]]]


def test_merged_patches_have_a_border_of_one_colour_and_nothing_between_them():
    image, stands = gray(), np.arange(12)
    stands[[0, 1]], stands[[10, 11]] = 0, 11
    drawn = draw_patches(image, stands, GRID)
    corner, far = drawn[0, 0], drawn[23, 31]
    assert (drawn[0, :16] == corner).all()
    assert (drawn[7, :16] == corner).all()
    assert (drawn[:8, 0] == corner).all()
    assert (drawn[23, 16:] == far).all()
    assert (corner != far).any()
    assert (drawn[2:6, 6:10] != corner).any(axis=2).all()
    assert (drawn[8:16] == image[8:16]).all()


def test_a_panel_counts_groups_and_not_patches():
    panel = Panel("before block 1", np.array([0, 0, 2, -1, 4, -2]))
    assert panel.left == 3
    assert panel.numbers()["dropped"] == 1


def test_a_question_with_dollars_is_no_formula():
    title = "heading\nwhich costs less, the one for $5 or the one for $\\frac? " + "or another " * 20
    assert patches("x", title, gray(), GRID, []).title.startswith("heading which costs")


def test_pictures_are_equal_bytes_when_drawn_twice():
    draw = [patches("x", "t", gray(), GRID, [Panel("a", np.arange(12))]).content for _ in range(2)]
    assert draw[0] == draw[1]
    assert Image.open(io.BytesIO(draw[0])).format == "PNG"


@pytest.fixture(scope="module")
def pruned_vit(vit_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("show") / "tome"
    prune(vit_folder, "--out", out, "--quiet", "--no-eval")
    return out


def test_show_draws_a_sample_of_a_token_method(pruned_vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = json.loads(call("show", pruned_vit, "--sample", 2, "--json").stdout)["pictures"]
    assert [picture["path"] for picture in shown] == ["tome-pictures/sample-2.png"]
    left = [site["left"] for site in shown[0]["sites"]]
    assert left == sorted(left, reverse=True)
    assert all(len(set(site["stands"])) == site["left"] for site in shown[0]["sites"])
    assert Image.open(tmp_path / shown[0]["path"]).width > 500


def test_show_draws_an_image_of_ones_own(pruned_vit, tmp_path):
    file = tmp_path / "mine.jpg"
    Image.fromarray(gray(40, 60)).save(file)
    call("show", pruned_vit, "--image", file, "--to", tmp_path / "to")
    assert (tmp_path / "to" / "mine.png").exists()


def test_other_pictures_are_replaced_only_with_force_and_equal_ones_are_no_error(pruned_vit, tmp_path):
    words = ("show", pruned_vit, "--sample", 0, "--to", tmp_path)
    call(*words)
    file = tmp_path / "sample-0.png"
    drawn = file.read_bytes()
    call(*words)
    file.write_bytes(b"precious")
    with pytest.raises(UserError, match=r"sample-0.png exists; give another folder with --to, or --force"):
        call(*words)
    assert file.read_bytes() == b"precious"
    call(*words, "--force")
    assert file.read_bytes() == drawn


BAD = {
    "no such sample": (["--sample", "100000"], "the evaluation data has 2000 samples, from 0 on"),
    "two things at once": (["--sample", "1", "--image", "x.png"], "exclude each other"),
    "no such image": (["--image", "nowhere.png"], "--image nowhere.png is not a readable image"),
    "text for an image model": (["--prompt", "what?"], "an image model reads no text"),
    "a folder for nothing": (["--to", "x"], "say of what: --sample N or --image FILE"),
}


@pytest.mark.parametrize("case", BAD)
def test_nonsense_is_one_clear_line_and_nothing_is_written(case, pruned_vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, clue = BAD[case]
    with pytest.raises(UserError) as error:
        call("show", pruned_vit, *words)
    assert clue in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_pictures_are_never_put_into_an_artifact(pruned_vit):
    before = sorted(pruned_vit.iterdir())
    with pytest.raises(UserError, match="an output folder stays as it was written"):
        call("show", pruned_vit, "--sample", 0, "--to", pruned_vit / "pictures")
    assert sorted(pruned_vit.iterdir()) == before


def test_a_folder_says_what_it_holds_also_from_inside(pruned_vit, monkeypatch):
    monkeypatch.chdir(pruned_vit)
    assert json.loads(call("show", ".", "--json").stdout)["method"] == "tome"


def prune_weights(folder, text, out, *words):
    calibration = ("--calibration", 4, "--length", 24, "--batch-size", 2, "--limit", 2)
    call("llm-weights", *words, folder, "--data", text, *calibration, "--no-eval", "--out", out, "--quiet")
    return out


def show(folder, to, *words):
    return json.loads(call("show", folder, "--to", to, *words, "--json").stdout)["pictures"]


@pytest.mark.parametrize("stored", [(), ("--by-reference",), ("--loadable", "plain")])
def test_the_sparsity_drawn_is_that_of_the_weights_however_they_are_stored(stored, folder, text, tmp_path):
    out = prune_weights(folder, text, tmp_path / "out", "--method", "wanda", "--sparsity", 0.5, *stored)
    report = json.loads((out / "report.json").read_text())
    shown = show(out, tmp_path / "to", "--pictures")
    assert [picture["path"].rpartition("/")[2] for picture in shown] == ["sparsity.png", "sparsity.svg"]
    for row, recorded in zip(shown[0]["blocks"], report["per_layer"], strict=True):
        assert row["sparsity"] == pytest.approx(recorded["sparsity"], abs=1e-3)
        assert list(row["modules"])[:4] == ["q_proj", "k_proj", "v_proj", "o_proj"]
        assert all(share == pytest.approx(0.5, abs=0.02) for share in row["modules"].values())
    assert (tmp_path / "to" / "sparsity.svg").read_bytes().startswith(b"<?xml")


def test_widths_and_removed_blocks_are_drawn_from_the_report(folder, text, tmp_path):
    out = prune_weights(folder, text, tmp_path / "flap", "--method", "flap", "--sparsity", 0.4)
    shown = show(out, tmp_path / "to", "--pictures")
    assert {picture["path"].rpartition("/")[2] for picture in shown} >= {"widths.png", "widths.svg"}
    for row, recorded in zip(
        shown[0]["blocks"], json.loads((out / "report.json").read_text())["per_layer"], strict=True
    ):
        assert "{} of {}".format(*row["channels"]) == recorded["channels"]
        assert row["modules"]["channels"] == pytest.approx(1 - row["channels"][0] / row["channels"][1])
    out = prune_weights(folder, text, tmp_path / "short", "--method", "shortgpt", "--sparsity", 0.5)
    gone = [
        row["block"] for row in show(out, tmp_path / "other", "--pictures")[0]["blocks"] if row["removed"]
    ]
    recorded = json.loads((out / "report.json").read_text())["per_layer"]
    assert gone == [row["block"] for row in recorded if row["sparsity"] == 1]
    assert gone


def test_nothing_is_drawn_of_weights_unasked(folder, text, tmp_path, monkeypatch):
    out = prune_weights(folder, text, tmp_path / "out", "--method", "magnitude", "--sparsity", 0.5)
    monkeypatch.chdir(tmp_path)
    assert "pictures" not in json.loads(call("show", out, "--json").stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="say of what: --pictures"):
        call("show", out, "--to", tmp_path / "to")
    call("show", out, "--pictures")
    assert (tmp_path / "out-pictures" / "sparsity.png").exists()


def test_of_two_stages_weights_and_a_sample_are_drawn_together(folder, text, tmp_path):
    stages = (
        RecipeStage("llm-weights", "magnitude", sparsity=0.5),
        RecipeStage("llm-context", "streaming-llm", keep=0.5),
    )
    asked = Recipe(ModelSource(str(folder)), stages, data=str(text), length=48, limit=2, batch_size=2)
    execute(asked, Progress(quiet=True), out=str(tmp_path / "out"), evaluate=False)
    shown = show(tmp_path / "out", tmp_path / "to", "--sample", 0, "--pictures")
    names = [picture["path"].rpartition("/")[2] for picture in shown]
    assert names == ["sample-0.html", "stage-1-sparsity.png", "stage-1-sparsity.svg"]


def test_weights_have_no_sample(folder, text, tmp_path):
    out = prune_weights(folder, text, tmp_path / "out", "--method", "magnitude", "--sparsity", 0.5)
    with pytest.raises(UserError, match="holds pruned weights, which no sample decides"):
        call("show", out, "--sample", 0)


@pytest.mark.parametrize("method", ["snapkv", "streaming-llm", "lazyllm", "ftp"])
def test_the_mean_of_the_shades_of_a_prompt_is_what_was_kept(method, folder, text, tmp_path):
    words = ("--length", 128, "--data", text, "--no-eval", "--quiet", "--out", tmp_path / "out")
    call("llm-context", "--method", method, "--keep", 0.6, folder, *words)
    picture = show(tmp_path / "out", tmp_path / "to", "--sample", 0)[0]
    shares = [token["kept"] for token in picture["tokens"]]
    assert len(shares) == 96
    assert picture["mean"] == pytest.approx(0.6, abs=0.1)
    assert 0 <= min(shares) < max(shares) <= 1
    page = (tmp_path / "to" / "sample-0.html").read_text()
    assert page.count("<span") == 96 + 5
    assert "http" not in page
    piped = call(
        "show", tmp_path / "out", "--prompt", "weights and <masks> " * 4, "--to", tmp_path / "to"
    ).stdout
    assert "kept  [ ]: kept by at least half" in piped
    assert "&lt;" in (tmp_path / "to" / "prompt.html").read_text()


def test_a_streaming_window_keeps_the_first_and_the_last_tokens_of_a_prompt(folder, text, tmp_path):
    words = ("--length", 48, "--data", text, "--no-eval", "--quiet", "--out", tmp_path / "out")
    call("llm-context", "--method", "streaming-llm", "--keep", 0.5, folder, *words)
    shares = [token["kept"] for token in show(tmp_path / "out", tmp_path / "to", "--sample", 1)[0]["tokens"]]
    kept = [place for place, share in enumerate(shares) if share == 1]
    assert kept == [0, 1, 2, 3, *range(36 - 14, 36)]
    assert shares.count(0) == 18


@pytest.mark.parametrize("method", ["random", "plphp"])
def test_a_question_is_answered_with_and_without_the_tokens_that_left(method, tmp_path):
    out = tmp_path / "out"
    words = ("--limit", 4, "--batch-size", 4, "--no-eval", "--quiet", "--out", out)
    call("vlm", "--method", method, "--keep", 0.5, "digits-llava", *words)
    picture = show(out, tmp_path / "to", "--sample", 1)[0]
    assert {"question", "expected", "dense", "pruned"} <= set(picture)
    assert picture["grid"] == [12, 12]
    site = picture["sites"][0]
    kept = [place for place, heir in enumerate(site["stands"]) if heir >= 0]
    assert len(kept) == site["left"] == 144 - site["dropped"]
    with pytest.raises(UserError, match="a question needs an image"):
        call("show", out, "--prompt", "where?")


@dataclass(frozen=True)
class Brightest(TokenMethod):
    """Keeps the tokens with the largest mean: the brightest patches, where the embedding is a mean of pixels."""

    reads = ()

    def stages(self, shape, knob):
        return [Stage(Site(1), 4)]

    def reduce(self, site, view, count, memory):
        brightness = view.hidden[:, view.prefix :].mean(2)
        chosen = view.prefix + brightness.topk(count).indices
        return Reduction.keep(torch.cat([torch.zeros_like(chosen[:, :1]), chosen], 1), view.hidden.shape[1])


def test_the_patches_that_stay_bright_are_where_the_image_was_bright(tmp_path):
    model = tiny_vit()
    for parameter in model.parameters():
        parameter.zero_()
    model.patch_embed.proj.weight.fill_(1e-3)
    image = np.zeros((32, 32, 3), np.uint8)
    image[8:16, 16:32] = image[16:24, 8:16] = image[24:32, 0:8] = 255
    Image.fromarray(image).save(tmp_path / "corner.png")
    recipe = Recipe(ModelSource("bright"), (RecipeStage("vit", "brightest"),))
    driver = VitPipeline(recipe, recipe.stage, Brightest(), Progress())
    subject = Subject(
        model, transforms.Compose([transforms.ToTensor()]), Source("bright", "memory", "", "timm")
    )
    with driver.apply(subject, None) as handle:
        picture = driver.pictures(subject, handle, Sample(image=str(tmp_path / "corner.png")))[0]
    left = np.array(picture.numbers["sites"][0]["stands"]).reshape(4, 4) >= 0
    assert left.tolist() == (image[4::8, 4::8, 0] == 255).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_vision_language_model_has_a_grid_of_image_tokens(kind):
    model = tiny(kind)
    subject = Subject(model, None, Source(kind, "memory", "", "transformers"))
    inputs = noise_prompts(model, 1, 0)
    with tprune.prune(model, "vlm/divprune", keep=0.5) as handle:
        handle.driver.trace = steps = []
        model(**inputs, use_cache=True)
        found = crops(subject, inputs, Image.fromarray(gray()))
    tokens = image_tokens(model, inputs)[0]
    places = torch.cat([crop.slots for crop in found])
    assert tokens[places[places >= 0]].all()
    assert len(places.unique()) >= 4
    for crop in found:
        panel = panels([(site, stands[0]) for site, stands in steps], crop.slots, "layer")[0]
        drawn = draw_patches(enlarge(fit(crop.pixels, crop.grid)), panel.stands, crop.grid)
        assert drawn.shape[0] * crop.grid[1] == pytest.approx(drawn.shape[1] * crop.grid[0], rel=0.5)
    _, stands = steps[-1]
    left = stands[0][tokens] >= 0
    assert 0 < left.sum() < tokens.sum()
