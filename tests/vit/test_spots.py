"""What methods learn in tiny models that tell the colour of one patch, and read it late."""

from copy import deepcopy

import pytest
import torch
from PIL import Image
from torch.nn import functional

import tprune
from tests.conftest import start, tiny_vit
from tests.vit.test_accuracy import accuracy
from tprune.methods import registry
from tprune.models.kinds import dissect
from tprune.models.load import timm_transform
from tprune.models.vim import VisionMamba

COLOURS = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1.0]])
COUNT = 200
READS = 2
"""The only block whose attention does anything: what left before it is not seen."""


def spots(generator):
    """Pictures of grey noise with one patch in the colour of the class, and the classes."""
    labels = torch.arange(COUNT) % len(COLOURS)
    grey = 0.2 + 0.6 * torch.rand(COUNT, 1, 4, 8, 4, 8, generator=generator).expand(-1, 3, *[-1] * 4).clone()
    spot = COLOURS[labels, :, None, None] * (0.7 + 0.3 * torch.rand(COUNT, 1, 8, 8, generator=generator))
    row, column = torch.randint(4, (2, COUNT), generator=generator)
    grey[torch.arange(COUNT), :, row, :, column] = spot
    pixels = (255 * grey.reshape(COUNT, 3, 32, 32)).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(one) for one in pixels], labels


def taught(model, folder, rounds, rate):
    """The model after 60 steps; a folder to learn from, and pictures [n, 3, H, W] with labels [n] that it has not seen.

    Args:
        model: the parts that require a gradient learn.
        folder: where to leave the pictures.
        rounds: of `COUNT` pictures.
        rate: of AdamW.
    """
    generator, prepare = torch.Generator().manual_seed(0), timm_transform(model)
    pictures, labels = [], []
    for _ in range(rounds):
        some, classes = spots(generator)
        pictures, labels = pictures + some, labels + classes.tolist()
    for place, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        (folder / str(label)).mkdir(exist_ok=True)
        picture.save(folder / str(label) / f"{place}.png")
    pixels, labels = torch.stack([prepare(picture) for picture in pictures]), torch.tensor(labels)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=rate)
    for _ in range(60):
        some = torch.randint(len(pixels), (50,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(pixels[some]), labels[some]).backward()
        optimizer.step()
    unseen, truth = spots(generator)
    return model.requires_grad_(False), folder, torch.stack([prepare(one) for one in unseen]), truth


@pytest.fixture(scope="module")
def spotted(tmp_path_factory):
    """What `taught` gives for a plain vision transformer."""
    model = tiny_vit().requires_grad_(True)
    for layer, block in enumerate(model.blocks):
        if layer != READS:
            block.attn.requires_grad_(False)
            block.attn.proj.weight.zero_()
    return taught(model, tmp_path_factory.mktemp("spots"), 1, 3e-3)


def test_queries_of_cropr_find_the_patch_that_tells_the_class(spotted):
    model, folder, pixels, labels = spotted
    rivals = []
    for rival, first in (("cropr", start("cropr", model)), ("vit/random", {})):
        with tprune.prune(model, rival, keep=0.5, **first):
            rivals.append(accuracy(model, pixels, labels))
    settings = {"epochs": 6.0, "batch": 20, "query_lr": 0.01, "tune": False}
    with tprune.prune(model, "cropr", keep=0.5, fit=str(folder), **settings):
        assert accuracy(model, pixels, labels) > max(rivals) + 0.1


def precision(model, pixels, labels, head, count=10):
    """How many of the `count` pictures with the nearest codes are of the same class, the mean over pictures."""
    with torch.no_grad():
        codes = (model(pixels) @ head["head.weight"].T + head["head.bias"]).sign()
    alike = (codes @ codes.T).fill_diagonal_(-torch.inf)
    # Among equals the order of the pictures, which come class by class in turn, says nothing.
    nearest = alike.sort(descending=True, stable=True).indices[:, :count]
    return (labels[nearest] == labels[:, None]).double().mean().item()


def test_eet_learns_to_tell_classes_and_codes_from_what_is_left(spotted):
    model, folder, pixels, labels = spotted
    model = deepcopy(model)
    head = registry.build("eet", "vit").neutral_state(dissect(model).shape, 0)
    with tprune.prune(model, "eet", keep=0.5):
        right, near = accuracy(model, pixels, labels), precision(model, pixels, labels, head)
    with tprune.prune(
        model, "eet", keep=0.5, fit=str(folder), epochs=6.0, batch=20, lr=0.03, head_lr=0.03
    ) as handle:
        assert accuracy(model, pixels, labels) > right + 0.1
        assert precision(model, pixels, labels, handle.tensors(False)) > near + 0.1


def test_a_vim_learns_to_read_in_time_what_top_vim_leaves(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionMamba(img_size=32, patch_size=8, embed_dim=16, depth=2, num_classes=5)
        for name, part in model.named_modules():
            if isinstance(part, torch.nn.Linear | torch.nn.Conv2d) and "dt_proj" not in name:
                part.weight.data.normal_(std=0.2)
    # Nothing is read before the tokens leave, so that much is lost with them.
    first = model.layers[0].mixer.requires_grad_(False)
    first.out_proj.weight.zero_()
    model, folder, pixels, labels = taught(model, tmp_path, 5, 0.02)
    budget = {"keep": 0.6, "layers": (12,)}
    with tprune.prune(model, "top-vim", **budget):
        unfitted = accuracy(model, pixels, labels)
    with tprune.prune(model, "top-vim", **budget, fit=str(folder), epochs=1.0, batch=50, lr=0.01):
        assert accuracy(model, pixels, labels) > unfitted + 0.1
