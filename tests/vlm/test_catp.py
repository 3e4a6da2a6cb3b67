"""CATP against its description, one prompt and one token at a time."""

import torch

from tests.vlm.test_golden import prompt
from tprune.core.budget import PROJECTOR
from tprune.methods import registry
from tprune.methods.attention import Attention
from tprune.methods.token_view import TokenView
from tprune.methods.tokens import Shape


def scaled(values):
    return (values - values.min()) / (values.max() - values.min())


def test_stage_one_takes_what_fits_the_text_and_differs_from_what_is_taken():
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(2, n, 8, generator=generator) for n in (12, 5))
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    words = TokenView(text, ~real, real=real)
    everything = torch.ones(2, 12, dtype=torch.bool)
    view = TokenView(image, everything, signals={"text": lambda: words})
    index = registry.build("catp", "vlm").reduce(PROJECTOR, view, 4, {}).index
    for row in range(2):
        unit = image[row] / image[row].norm(dim=1, keepdim=True)
        said = text[row][real[row]]
        weight = scaled((unit @ (said / said.norm(dim=1, keepdim=True)).T).mean(1))
        picks = [int(weight.argmax())]
        while len(picks) < 4:
            worth = weight * (1 - (unit @ unit[picks].T).amax(1))
            picks.append(int(worth.index_fill(0, torch.tensor(picks), -torch.inf).argmax()))
        assert index[row].tolist() == sorted(picks)


def test_stage_two_adds_the_attention_gained_to_the_similarity_to_the_question():
    generator = torch.Generator().manual_seed(1)
    method, image = registry.build("catp", "vlm"), prompt(20, 3, 12)
    _, early, late = (stage.site for stage in method.stages(Shape(32, 12), None))
    assert (early.layer, late.layer) == (7, 11)
    hidden = torch.randn(1, 20, 8, generator=generator)
    maps = [torch.randn(1, 2, 20, 20, generator=generator).softmax(-1) for _ in range(2)]
    memory = {}
    for site, weights in zip((early, late), maps, strict=True):
        view = TokenView(
            hidden,
            image,
            depth=32,
            whole=False,
            real=torch.ones_like(image),
            attention=Attention(weights, weights, weights, 1.0, map=weights),
        )
        reduction = method.reduce(site, view, 5, memory)
        assert (reduction is None) == (site == early)
    gained = scaled((maps[1] - maps[0])[0].mean(0)[-1, 3:15])
    alike = scaled(torch.cosine_similarity(hidden[0, 3:15], hidden[0, -1:], dim=1))
    best = (gained / 2 + alike / 2).topk(5).indices.sort().values + 3
    assert reduction.index[0].tolist() == [0, 1, 2, *best.tolist(), *range(15, 20)]
