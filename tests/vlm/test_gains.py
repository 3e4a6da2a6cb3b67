"""What methods learn is worth having: after a few steps the tokens that matter stay, which by chance they would not."""

import pytest
import torch
from torch.nn import functional

from tests.vlm.test_learned import SHAPE, prompt
from tprune.core.budget import PROJECTOR, Stage
from tprune.methods import registry
from tprune.methods.attention import Attention
from tprune.methods.token_view import TokenView
from tprune.methods.tokens import Shape

IMAGE = slice(2, 11)
STEPS = 60


def learn(fit, lesson, steps=STEPS):
    """`steps` steps on the losses of lesson(step), and what the losses were."""
    optimizer = torch.optim.Adam(fit.parameters(), 1e-2)
    told = []
    for step in range(steps):
        fit.generator = torch.Generator().manual_seed(step)
        loss = sum(lesson(step).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        told.append(loss.item())
    return told


def asked(seed):
    """Prompts in which one image token, told by its first numbers, has the answer in its last two; and the answers."""
    view, generator = prompt(seed, batch=16), torch.Generator().manual_seed(seed)
    view.real = None
    place = torch.randint(9, (16, 1), generator=generator)
    answer = torch.randint(2, (16,), generator=generator)
    view.hidden[:, IMAGE, 0] = -2
    view.hidden[:, IMAGE].scatter_(1, place[..., None].expand(-1, -1, 1), 4.0)
    view.hidden[:, IMAGE, 6:] = functional.one_hot(answer, 2).float()[:, None]
    return view, place[:, 0], answer


def read(view, place, answer, present):
    """Logits [B, 2] of a model that finds the token with the answer if it is there at all, and else says the other."""
    looks = (functional.one_hot(place, 9) * 8.0).exp() * present[:, IMAGE]
    told = functional.one_hot(answer, 2).float()
    found = looks.gather(1, place[:, None]) / (looks.sum(1, keepdim=True) + 1)
    return 6 * (found * told + (1 - found) * (1 - told))


@pytest.mark.parametrize("method", ["covipal", "lvpruning"])
def test_a_token_without_which_there_is_no_answer_stays(method):
    built = registry.build(method, "vlm")
    fit = built.fit(SHAPE, 0.5, 0)
    fit.settle(1.0)

    def lesson(step):
        view, place, answer = asked(step)
        memory = {"left": []}
        for site in fit.sites:
            marked = fit.at(site, view, memory)
            view.present = marked.present
            left = marked.present[view.prunable].mean()
            memory["left"].append(Stage(site, left))
        return fit.losses(read(view, place, answer, marked.present), answer, memory, None)

    learn(fit, lesson)
    view, place, _ = asked(1000)
    rates = []
    for state in (fit.state(), built.neutral_state(SHAPE, 0)):
        kept = built.bind(state).reduce(fit.sites[0], view, 3, {})
        rates.append((kept.index == place[:, None] + 2).any(1).float().mean().item())
    assert rates[0] == 1
    assert rates[1] < 0.8


def test_what_has_something_in_it_is_told_from_the_ground():
    method = registry.build("index-preserving", "vlm", {"features": 8, "reach": 0})
    shape = Shape(4, 12, patch=(3, 2, 2))
    fit = method.fit(shape, None, 0)
    boxes = torch.tensor([[[0.0, 0.0, 0.4, 0.6]], [[0.6, 0.4, 1.0, 1.0]]])
    rows, there = torch.arange(2), torch.ones(2, 12, dtype=torch.bool)
    inside = {0: [0, 1, 4, 5], 1: [6, 7, 10, 11]}

    def seen(seed):
        pixels = torch.randn(2, 12, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
        for image, places in inside.items():
            pixels[image, places, 0] += 2
        view = TokenView(there.unsqueeze(2), there, grid=(3, 4))
        view.signals = {"pixels": lambda: pixels, "rows": lambda: rows}
        return view

    def lesson(step):
        memory = {"inputs": {"boxes": boxes}}
        fit.at(PROJECTOR, seen(step), memory)
        return fit.losses(None, None, memory, None)

    learn(fit, lesson)
    found = 0
    for seed in range(1000, 1010):
        kept = method.counted().bind(fit.state()).reduce(PROJECTOR, seen(seed), 4, {})
        found += sum(len({*kept.index[image].tolist()} & {*inside[image]}) for image in inside)
    assert found > 70


def test_what_an_answer_came_from_is_foretold():
    built = registry.build("explain-compress", "vlm", {"layers": 2, "channels": 8})
    shape = Shape(1, 9, heads=2, width=8)
    fit = built.fit(shape, 0.5, 0)
    answers = torch.zeros(2, 14, dtype=torch.bool)
    answers[:, -1] = True

    def lesson(step):
        view = prompt(step)
        attention = view.attention
        attention = Attention(3 * attention.query, attention.key, attention.value, 0.5, causal=True)
        view.signals = view.signals | {"next_attention": lambda: attention}
        maps = attention.rows().nan_to_num().detach().requires_grad_()
        # The answers come from where the first head looks.
        outputs = torch.stack([maps[:, 0, -2, IMAGE].sum(1), maps[:, 0, -2, IMAGE].sum(1) * 0], 1)
        memory = {"attention": {0: maps}, "inputs": {"answers": answers}}
        fit.at(fit.sites[0], view, memory)
        return fit.losses(outputs, torch.zeros(2, dtype=torch.long), memory, None)

    told = learn(fit, lesson)
    even = torch.tensor(9.0).log().item()
    assert sum(told[-10:]) / 10 < min(even, sum(told[:10]) / 10) - 0.1
