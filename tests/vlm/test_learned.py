"""What methods compute with what they have learned, beside plain loops over their equations."""

import pytest
import torch

from tprune.core.budget import Site
from tprune.core.relax import gumbel
from tprune.methods import registry
from tprune.methods.attention import Attention
from tprune.methods.token_view import TokenView
from tprune.methods.tokens import Shape
from tprune.methods.vlm._guided import Guided, guided

SHAPE = Shape(8, 9, heads=2, width=8)


def prompt(seed=0, batch=2):
    """Two words, nine image tokens, three words; the second row begins with padding."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, 14, 8, generator=generator)
    image = torch.zeros(batch, 14, dtype=torch.bool)
    image[:, 2:11] = True
    real = torch.ones_like(image)
    real[1, 0] = False
    query, key = (torch.randn(batch, heads, 14, 4, generator=generator) for heads in (2, 1))
    cells = torch.full((batch, 14, 3), -1)
    place = torch.arange(9)
    cells[:, 2:11] = torch.stack([place * 0, place // 3, place % 3], 1)
    position = torch.arange(14).expand(batch, -1)
    return TokenView(
        hidden,
        image,
        depth=8,
        whole=False,
        position=position,
        real=real,
        attention=Attention(query, key, key, 0.5, causal=True),
        signals={"cells": lambda: cells},
    )


def test_a_token_reads_the_words_and_no_other_token():
    view, module = prompt(), Guided(8, 2, 1).begin(torch.Generator().manual_seed(1))
    words = view.real & ~view.prunable
    found = guided(
        {f"x.{name}": part for name, part in module.state_dict().items()}, "x", 2, 1, view.hidden, words
    )
    for row in range(2):
        normal = [(x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() for x in view.hidden[row]]
        spoken = [x for x, word in zip(normal, words[row], strict=True) if word]
        for place, x in enumerate(normal):
            parts = []
            for head in range(2):
                own = slice(4 * head, 4 * head + 4)
                query = (module.query.weight @ x)[own]
                logits = torch.stack([query @ (module.key.weight @ word)[own] / 2 for word in spoken])
                values = torch.stack([(module.value.weight @ word)[own] for word in spoken])
                parts.append(logits.softmax(0) @ values)
            inner = torch.nn.functional.gelu(module.inner(x + torch.cat(parts)))
            assert torch.allclose(found[row, place], module.outer(inner), atol=1e-5)


@pytest.mark.parametrize("method", ["lvpruning", "covipal"])
def test_the_image_tokens_with_the_largest_margins_stay(method):
    built = registry.build(method, "vlm")
    built = built.bind(built.neutral_state(SHAPE, 3))
    [stage] = built.stages(SHAPE, 0.5)[:1]
    view = prompt()
    name = "module" if method == "covipal" else f"before.{stage.site.layer}"
    logits = guided(
        built.state, name, 8, 1 if method == "covipal" else 2, view.hidden, view.real & ~view.prunable
    )
    score = logits[..., -1] - (0 if method == "covipal" else logits[..., 0])
    kept = built.reduce(stage.site, view, 4, {})
    for row in range(2):
        best = sorted(range(2, 11), key=lambda place, row=row: -score[row, place].item())[:4]
        left = [place for place in kept.index[row].tolist() if 2 <= place < 11]
        assert left == sorted(best)
        assert kept.count == 9


def test_what_is_learned_first_is_where_the_words_of_a_deeper_layer_look():
    built = registry.build("covipal", "vlm")
    fit, view, memory = built.fit(SHAPE, 0.5, 0), prompt(), {}
    fit.at(fit.sites[0], view, memory)
    rows = view.attention.rows().nan_to_num()
    memory["attention"] = {fit.guide: rows}
    loss = fit.losses(None, None, memory, None)["attention"]
    expected = 0
    for row in range(2):
        paid = torch.stack([rows[row, :, 11:, image].sum() for image in range(2, 11)])
        said = memory["score"][row, 2:11].log_softmax(0)
        expected -= (paid / paid.sum() * said).sum() / 2
    assert torch.allclose(loss, expected, atol=1e-5)
    fit.settle(0.5)
    assert not fit.watches
    fit.generator = torch.Generator().manual_seed(0)
    marked = fit.at(fit.sites[0], view, memory).present
    uniform = torch.rand(2, 14, generator=torch.Generator().manual_seed(0))
    # Half of nine is four: the fourth stays half of the time.
    last = memory["score"][:, 2:11].sort(1).values[:, [5]]
    drawn = (uniform.log() - (1 - uniform).log() + memory["score"] - last).sigmoid()
    assert torch.allclose(marked[:, 2:11], drawn[:, 2:11], atol=1e-5)
    assert marked[:, :2].eq(1).all()


def test_the_margins_of_atp_llava_are_those_of_its_equations():
    built = registry.build("atp-llava", "vlm", {"width": 4})
    fit, view = built.fit(SHAPE, 0.5, 5), prompt()
    site = fit.sites[0]
    own = fit.before[str(site.layer)]
    for part in own.values():
        torch.nn.init.normal_(part)
    redundant, spatial = built.margins(view, own)
    query, key = view.attention.query, view.attention.key.expand(-1, 2, -1, -1)
    logits, rows = 0.5 * query @ key.transpose(2, 3), view.attention.rows()
    image = slice(2, 11)
    for row in range(2):
        own_score = logits[row, :, image, image].mean(0).mean(1)
        cross = rows[row, :, 11:, image].mean(0).mean(0)
        scaled = [(x - x.min()) / (x.max() - x.min()) for x in (own_score, cross)]
        z = torch.stack([x.mean() for x in scaled]) @ own["enter"] + own["enter_bias"]
        for found, name, value in (
            (redundant, "redundant", (scaled[0] + scaled[1]) / 2),
            (spatial, "spatial", torch.tensor([0.25, 0, 0.25, 0, 0, 0, 0.25, 0, 0.25])),
        ):
            threshold = torch.sigmoid(z @ own[name] + own[f"{name}_bias"])
            assert torch.allclose(found[row, image], value - threshold, atol=1e-5)
    passes = torch.maximum(redundant, spatial)[:, image] > 0
    kept = built.bind(fit.state()).reduce(site, view, 0, {})
    there = torch.zeros(2, 14, dtype=torch.bool)
    for row in range(2):
        real = kept.index[row] if kept.valid is None else kept.index[row][kept.valid[row]]
        there[row, real] = True
    assert torch.equal(there[:, image], passes | (~passes.any(1, keepdim=True) & there[:, image]))
    assert there[:, image].any(1).all()


def test_a_gumbel_choice_is_drawn_as_the_softmax_has_it():
    logits = torch.tensor([1.0, 0.0]).expand(20_000, 2).clone().requires_grad_()
    drawn = gumbel(logits, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(drawn.sum(1), torch.ones(20_000))
    assert drawn[:, 0].mean().item() == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item(), abs=0.01)
    drawn[:, 0].sum().backward()
    assert logits.grad[:, 0].gt(0).all()


def test_lvpruning_holds_every_stage_to_its_fraction():
    built = registry.build("lvpruning", "vlm")
    fit = built.fit(SHAPE, None, 0)
    fit.generator = torch.Generator().manual_seed(0)
    assert fit.sites == tuple(stage.site for stage in built.stages(SHAPE, None))
    marked = fit.at(fit.sites[0], prompt(), {}).present
    assert marked[:, 2:11].unique().tolist() in ([0, 1], [1], [0])
    memory = {"left": [type(stage)(stage.site, torch.tensor(0.75)) for stage in built.stages(SHAPE, None)]}
    found = fit.losses(torch.zeros(1, 2), torch.tensor([0]), memory, None)
    assert found["budget"].item() == pytest.approx(sum((0.75 - target) ** 2 for target in fit.targets))
    assert isinstance(fit.sites[0], Site)
