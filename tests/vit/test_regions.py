"""What patches show, followed through whatever the model does to its images first."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tprune.data.regions import Covering, training
from tprune.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Two images of 40x20."""
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("RGB", (40, 20)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def prepare(image):
    """A preprocessing that makes 16 rows of it and keeps the left 32 columns."""
    pixels = torch.from_numpy(np.asarray(image.resize((40, 16)), dtype=np.float32))
    return pixels[:, :32].permute(2, 0, 1) / 100 - 1


def covering(data):
    found = Covering(data, prepare, (2, 4))
    return [found.sample(place)[1] for place in range(len(data))]


def test_boxes_are_followed_through_the_preprocessing(folder):
    boxes = [
        {"image_id": 7, "category_id": 90, "bbox": [20, 0, 20, 20]},
        {"image_id": 7, "category_id": 3, "bbox": [0, 0, 20, 10]},
    ]
    told = {
        "images": [{"id": 7, "file_name": "images/a.png"}, {"id": 2, "file_name": "images/b.png"}],
        "categories": [{"id": 90, "name": "late"}, {"id": 3, "name": "early"}],
        "annotations": boxes,
    }
    (folder / "annotations.json").write_text(json.dumps(told))
    data = training(str(folder))
    first, second = covering(data)
    assert data.names == 3
    assert second[:, 2].eq(1).all()
    first = first.view(2, 4, 3)
    assert first[:, 3, 1].gt(0.95).all()
    assert first[0, :2, 0].gt(0.9).all()
    assert first[1, :2, 2].gt(0.9).all()
    assert torch.allclose(first.sum(-1), torch.ones(2, 4))


def test_maps_name_what_they_show_and_nothing_where_they_are_void(folder):
    (folder / "annotations").mkdir()
    for name, value in (("a", 4), ("b", 255)):
        picture = Image.new("L", (40, 20), value)
        picture.paste(1, (0, 0, 20, 20))
        picture.save(folder / "annotations" / f"{name}.png")
    data = training(str(folder))
    first, second = covering(data)
    assert data.names == 6
    assert first[[0, 1, 3]].argmax(-1).tolist() == [1, 1, 4]
    assert second[[4, 5, 7]].argmax(-1).tolist() == [1, 1, 5]


def test_a_folder_without_annotations_says_what_is_wanted(folder):
    with pytest.raises(UserError, match=r"no annotations; give a folder with annotations\.json"):
        training(str(folder))
    (folder / "annotations.json").write_text("{}")
    with pytest.raises(UserError, match="is not in COCO's format"):
        training(str(folder))
    (folder / "annotations.json").unlink()
    (folder / "annotations").mkdir()
    with pytest.raises(UserError, match=r"no map annotations/a\.png; every image needs one"):
        training(str(folder))
