"""Clips on disk: a folder per class, a folder per clip, its frames as images."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner

import tprune
from tests.videos import noise, save_clips, save_model
from tprune.cli import command
from tprune.data import clips
from tprune.errors import UserError


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return save_clips(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "videomae")


def run(*words):
    return CliRunner().invoke(command, [str(word) for word in words])


def test_frames_come_in_order_and_from_the_middle_of_equal_parts(tmp_path):
    root = save_clips(tmp_path, classes=("jump",), clips=1, frames=16)
    for count, expected in ((16, list(range(16))), (8, [1, 3, 5, 7, 9, 11, 13, 15]), (3, [2, 8, 13])):
        frames = clips.read(str(root), None, count).open(0)
        assert [frame.getpixel((0, 0))[0] for frame in frames] == expected


def test_clips_are_dealt_evenly_over_the_classes(videos):
    found = clips.read(str(videos), 3, 8)
    assert found.labels == (0, 1, 0)
    assert [item[0].parent.name for item in found.items] == ["clip-0", "clip-0", "clip-1"]
    assert found.protocol["samples"] == len(found) == 3


def test_sta_prunes_a_video_classifier_from_disk_and_comes_back_from_its_folder(videos, saved, tmp_path):
    out = tmp_path / "out"
    words = ("vit", "--method", "sta", "--set", "r=50", saved, "--data", videos, "--out", out, "--json")
    report = json.loads(run(*words).stdout)
    assert report["protocol"]["data"]["samples"] == 4
    assert 0 <= report["pruned"]["accuracy"] <= 1
    assert report["pruned"]["flops"] < report["dense"]["flops"]
    # Of 4 tokens a frame 50 of 196 are 1: it leaves 4 groups, then 2, then 1.
    assert [row["tokens_attention"] for row in report["per_layer"]] == [16, 12, 12, 10, 10, 9]
    model = tprune.load(out)
    pruned = model(noise()).logits
    model.tprune_handle.remove()
    assert not torch.equal(model(noise()).logits, pruned)


def test_what_learns_is_fitted_on_clips(videos, saved):
    words = (
        "vit",
        "--method",
        "tnt",
        "--keep",
        0.7,
        "--fit",
        videos,
        "--set",
        "epochs=1",
        "--set",
        "batch=2",
    )
    report = json.loads(run(*words, saved, "--data", videos, "--json").stdout)
    assert (report["fit"]["steps"], report["fit"]["unit"]) == (2, "clips")


def test_a_clip_is_drawn_frame_under_frame(videos, saved, tmp_path):
    run(
        "vit",
        "--method",
        "sta",
        "--keep",
        0.6,
        saved,
        "--data",
        videos,
        "--out",
        tmp_path / "out",
        "--no-eval",
    )
    words = ("--sample", 1, "--to", tmp_path / "pictures", "--json")
    (picture,) = json.loads(run("show", tmp_path / "out", *words).stdout)["pictures"]
    assert picture["grid"] == [8, 2]
    assert [site["left"] for site in picture["sites"]] == [12, 8, 7]
    refused = run("show", tmp_path / "out", "--image", videos / "run" / "clip-0" / "000.png")
    assert "this model sees videos; give --sample N" in str(refused.exception)


@pytest.mark.parametrize(
    ("spoil", "clue"),
    [
        (lambda root: None, "there are none built in; give --data FOLDER"),
        (lambda root: root / "nowhere", "nowhere: no such folder; give a folder of CLASS/CLIP/FRAME.png"),
        (lambda root: root / "run" / "clip-0", "no clips in it; this model sees videos"),
        (
            lambda root: (root / "run" / "clip-0" / "003.png").unlink() or root,
            "7 frames in .*run/clip-0, and this model sees 8",
        ),
    ],
)
def test_bad_clips_are_one_line(videos, spoil, clue, tmp_path):
    root = shutil.copytree(videos, tmp_path / "videos")
    source = spoil(root)
    with pytest.raises(UserError, match=clue) as error:
        clips.read(None if source is None else str(source), None, 8)
    assert "\n" not in str(error.value)


def test_a_frame_that_is_no_image_is_told_by_the_option_that_named_it(videos, tmp_path):
    root = shutil.copytree(videos, tmp_path / "videos")
    (root / "jump" / "clip-0" / "003.png").write_text("no image")
    found = clips.read(str(root), None, 8, "--fit")
    with pytest.raises(UserError, match="--fit: .*jump/clip-0/003.png is not a readable image"):
        found.open(0)
