"""What methods learn is worth having: after a few steps the tokens that matter stay, which by chance they would not."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.vlm.test_learned import SHAPE, prompt
from tprune.core import select
from tprune.core.budget import PROJECTOR, Stage, mean_entering
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


def test_thresholds_of_atp_llava_come_to_the_asked_mean():
    method = registry.build("atp-llava", "vlm", {"depth_penalty": 0.0})
    fit = method.fit(SHAPE, 0.5, 0)

    def lesson(step):
        view, memory = prompt(step, batch=4), {"left": []}
        for site in fit.sites:
            marked = fit.at(site, view, memory)
            view.present = marked.present
            memory["left"].append(Stage(site, marked.present[view.prunable].mean()))
        return fit.losses(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), memory, None)

    def entering(state):
        """The mean fraction of the image tokens that enters a layer, where those that do not pass leave."""
        view, left, there = prompt(1000, batch=64), [], True
        for site in fit.sites:
            kept = method.bind(state).reduce(site, view, 0, {})
            there = select.mark(kept.index, kept.valid, 14) & there
            left.append(Stage(site, there[view.prunable].float().mean().item()))
        return mean_entering(left, 1, SHAPE.depth)

    learn(fit, lesson)
    before, after = (abs(entering(one) - 0.5) for one in (method.neutral_state(SHAPE, 0), fit.state()))
    assert after < 0.05 < 0.1 < before


def test_glimpseprune_learns_where_the_answer_is():
    method = registry.build(
        "glimpseprune", "vlm", {"width": 16, "condition": 16, "heads": 2, "blocks": "3,2"}
    )
    shape = Shape(4, 12, heads=2, width=8, tower=6)
    fit = method.fit(shape, None, 0)
    place = torch.arange(12)
    cells = torch.stack([place * 0, place // 4, place % 4], 1).expand(8, -1, -1)
    image = torch.ones(8, 12, dtype=torch.bool)

    def seen(seed):
        """Images in which a box of two cells looks different to the tower; and the boxes."""
        generator = torch.Generator().manual_seed(seed)
        encoded = torch.randn(2, 8, 12, 6, generator=generator)
        row, column = (torch.randint(size, (8,), generator=generator) for size in (3, 3))
        inside = (cells[..., 1] == row[:, None]) & ((cells[..., 2] - column[:, None] - 0.5).abs() < 1)
        encoded[..., 0] += 3 * inside
        query, key = (
            torch.randn(8, 2, 1, 4, generator=generator),
            torch.randn(8, 2, 13, 4, generator=generator),
        )
        attention = Attention(query, key, key, 0.5)
        behind = SimpleNamespace(
            tell=lambda *given: (attention, torch.zeros(8, 2)), look=lambda added: attention
        )
        view = TokenView(torch.zeros(8, 12, 8), image)
        signals = {"cells": cells, "encoded": list(encoded), "beside": behind}
        view.signals = {name: lambda value=value: value for name, value in signals.items()}
        boxes = torch.stack([column / 4, row / 3, (column + 2) / 4, (row + 1) / 3], 1) + torch.tensor(
            [0.01, 0.01, -0.01, -0.01]
        )
        return view, boxes.unsqueeze(1), inside

    def lesson(step):
        view, boxes, _ = seen(step)
        memory = {"inputs": {"boxes": boxes, "answers": None}}
        fit.at(fit.sites[0], view, memory)
        return fit.losses(None, torch.zeros(8, dtype=torch.long), memory, None)

    learn(fit, lesson)
    view, _, inside = seen(1000)
    found = []
    for state in (fit.state(), method.neutral_state(shape, 0)):
        kept = method.counted().bind(state).reduce(fit.sites[0], view, 2, {})
        found.append(inside.gather(1, kept.index).float().mean().item())
    assert found[0] > 0.9
    assert found[1] < 0.6


def test_one_model_answers_from_few_tokens_and_from_all_where_m3_had_it_learn_both():
    generator = torch.Generator().manual_seed(0)
    shown = torch.randn(4, 8, generator=generator)

    def images(seed):
        """One of 16 tokens shows which of four answers is right, and the others are noise."""
        draw = torch.Generator().manual_seed(seed)
        hidden, answer = 0.3 * torch.randn(32, 16, 8, generator=draw), torch.randint(4, (32,), generator=draw)
        hidden[torch.arange(32), torch.randint(16, (32,), generator=draw)] = 4 * shown[answer]
        view = TokenView(hidden, torch.ones(32, 16, dtype=torch.bool), grid=(4, 4))
        return view, answer

    def right(scales, tokens):
        """How often a model that learned from these scales is right from so many tokens of 576."""
        fit = registry.build("m3", "vlm", {"scales": scales}).fit(Shape(4, 16), None, 0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            inner, outer = nn.Linear(8, 16), nn.Linear(16, 4)

        def answers(view):
            left = fit.at(PROJECTOR, view, {}).apply(view.hidden)
            return outer(inner(left).relu().amax(1))

        def lesson(step):
            view, answer = images(step)
            return fit.losses(answers(view), answer, {"again": answers, "inputs": view}, None)

        learn(nn.ModuleList([inner, outer]), lesson)
        fit.scale = tokens
        view, answer = images(1000)
        return (answers(view).argmax(1) == answer).float().mean().item()

    assert right("36,576", 36) > 0.95
    assert right("36,576", 576) > 0.95
    assert right("576", 36) < 0.9
