"""Methods inside text encoders: padding, positions, heads, fits, folders."""

import json
import math
from functools import cache

import pytest
import torch

import tprune
from tests.decoders import count_hooks, decoder
from tests.encoders import NAMES, encoder, outputs, texts, tokenizer
from tests.fits import interrupted, same
from tests.golden_values import golden
from tests.test_cli import call
from tprune import artifact
from tprune.core import relax
from tprune.core.budget import Site
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.attention import Attention
from tprune.methods.token_view import TokenView
from tprune.methods.tokens import Shape
from tprune.models.source import Source
from tprune.models.subject import Subject
from tprune.pipelines.run import pipeline
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe, Stage

METHODS = registry.running_on("encoder", "llm-context")
every_method = pytest.mark.parametrize("method", METHODS)
every_encoder = pytest.mark.parametrize("name", NAMES)
OPEN = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
SOME = {
    "ltp": {"state": {"threshold": torch.tensor([0.0, 0.04, 0.08])}},
    "top": {"bins": 4, "state": {"keep": OPEN, "worth": OPEN}},
}
"""What may have been learned, so that some tokens leave the tiny encoders."""


@pytest.fixture(scope="module")
def lessons(tmp_path_factory):
    """Texts whose class is how many of their letters are vowels."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for place in range(24):
        letters = torch.randint(26, (5 + place % 9,), generator=generator)
        text = "".join(chr(97 + int(letter)) for letter in letters)
        rows.append({"text": text, "label": sum(letter in "aeiou" for letter in text) % 5})
    file = tmp_path_factory.mktemp("texts") / "lessons.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def pruned(model, method, **more):
    return tprune.prune(model, f"llm-context/{method}", tokenizer=tokenizer(), **more)


@every_encoder
@every_method
def test_keeping_all_is_bitwise_the_dense_model(method, name):
    for head in (True, False):
        model, given = encoder(name, head), texts()
        real = given["attention_mask"].bool()
        with torch.no_grad():
            dense = model(**given)[0]
            with pruned(model, method, keep=1.0, **SOME[method]) as handle:
                found = model(**given)[0]
                assert torch.equal(found if head else found[real], dense if head else dense[real])
                assert handle.achieved().value == 1
            assert torch.equal(model(**given)[0], dense)
        assert count_hooks(model) == 0


@every_encoder
@every_method
def test_a_text_is_pruned_alike_alone_and_padded_among_others(method, name):
    model, given = encoder(name), texts()
    lengths = given["attention_mask"].sum(1).tolist()
    with pruned(model, method, **SOME[method]) as handle:
        together = outputs(model, given["input_ids"], given["attention_mask"])[0]
        alone = [outputs(model, row[None, :n])[0] for row, n in zip(given["input_ids"], lengths, strict=True)]
        assert 0.2 < handle.achieved().value < 0.95
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(
        together, outputs(model, given["input_ids"], given["attention_mask"])[0], atol=1e-3
    )


@every_encoder
@every_method
def test_tokens_that_left_keep_their_last_values_where_every_token_is_read(method, name):
    whole, bare, given = encoder(name), encoder(name, head=False), texts()
    bare.load_state_dict(whole.base_model.state_dict(), strict=False)
    with torch.no_grad(), pruned(whole, method, **SOME[method]), pruned(bare, method, **SOME[method]):
        found = bare(**given).last_hidden_state
        short = whole.base_model(**given).last_hidden_state
    assert found.shape[1] == given["input_ids"].shape[1]
    assert short.shape[1] < found.shape[1]
    torch.testing.assert_close(found[:, 0], short[:, 0])


def test_what_leaves_is_what_later_blocks_do_not_see():
    """The survivors of the second block's threshold, and the same as a mask of the model's own from there on."""
    model, given = encoder(), texts(rows=1)
    state = {"threshold": torch.tensor([0.0, 0.055, 0.0])}
    with pruned(model, "ltp", state=state) as handle:
        found, _ = outputs(model, given["input_ids"])
        left = handle.per_layer()[2]["tokens_attention"]
        stays = handle.driver.position[0]
    assert 3 < left < 18
    block = model.bert.encoder.layer
    with torch.no_grad():
        hidden = block[1](block[0](model.bert.embeddings(given["input_ids"])))
        mask = torch.zeros(20, dtype=torch.bool)
        mask[stays] = True
        last = block[2](hidden, attention_mask=mask[None, None, None])
        expected = model.classifier(model.bert.pooler(last))
    torch.testing.assert_close(found, expected)


def test_ltp_s_masks_are_the_authors_but_for_the_class_token():
    tensors, told = golden("llm-context", "ltp")
    final = told["settings"]["final_threshold"]
    method = registry.build("ltp", "llm-context", {"padded": True, "final_threshold": final})
    thresholds = method.thresholds(4) + tensors["delta"]
    method, memory = method.bind({"threshold": thresholds}), {}
    index, real = torch.arange(12).expand(2, -1), tensors["mask"].bool()
    for layer in range(4):
        query, key = (
            tensors[name][layer].gather(2, index[:, None, :, None].expand(-1, 3, -1, 4))
            for name in ("query", "key")
        )
        attention = Attention(
            query, key, key, told["settings"]["head_dim"] ** -0.5, bias=real[:, None, None, :]
        )
        prunable = (index > 0) & real
        view = TokenView(torch.zeros(*index.shape, 1), prunable, depth=4, real=real, attention=attention)
        score = tensors[f"score{layer}"].gather(1, index)
        torch.testing.assert_close(method.received(view, memory)[real], score[real])
        assert thresholds[layer] == pytest.approx(tensors[f"threshold{layer}"].item())
        reduction = method.reduce(Site(layer, between=True), view, 12, memory)
        index, real = reduction.gather(index), reduction.valid if reduction.valid is not None else real
        alive = torch.zeros(2, 12, dtype=torch.bool).scatter(1, index, real)
        assert torch.equal(alive[:, 1:], tensors[f"alive{layer}"][:, 1:])
        assert alive[:, 0].all()


def test_top_s_gates_and_ranks_are_the_authors(monkeypatch):
    tensors, told = golden("llm-context", "top")
    bins, shape = told["settings"]["bins"], Shape(4, 11, prefix=1)
    method = registry.build("top", "llm-context", {"bins": bins})
    torch.testing.assert_close(relax.open_probability(tensors["loga"], 2 / 3), tensors["open"])
    with monkeypatch.context() as patched:
        patched.setattr(torch, "rand", lambda *shape, **more: tensors["uniform"])
        drawn = relax.hard_concrete(tensors["loga"], 2 / 3, None)
    torch.testing.assert_close(drawn, tensors["drawn"])
    fit = method.fit(shape, 0.5, 0)
    fit.bins.data, fit.layers.data = tensors["loga"], tensors["layer"]
    state = fit.state()
    assert torch.equal(state["keep"], tensors["keep"])
    real, there = torch.ones(2, 12, dtype=torch.bool), tensors["before"].bool()
    for place in range(3):
        query, key = tensors["query"][place], tensors["key"][place]
        attention = Attention(query, key, key, told["settings"]["head_dim"] ** -0.5)
        view = TokenView(torch.ones(2, 12, 1), real, depth=4, real=real, attention=attention)
        torch.testing.assert_close(method.received(view)[:, 1:], tensors[f"score{place}"])
        reduction = method.bind(state).reduce(Site(1 + place), view, 11, {})
        alive = torch.zeros(2, 12, dtype=torch.bool).scatter(1, reduction.index, True)
        assert torch.equal(alive[:, 1:], tensors[f"alive{place}"])
        memory = {"alive": there, "received": [], "gates": [drawn, torch.tensor([0.6, 0.0, 0.6])]}
        torch.testing.assert_close(fit.at(Site(1 + place), view, memory)[:, 1:, 0], tensors[f"kept{place}"])


def test_top_s_ranking_loss_is_a_sum_over_pairs_of_the_teacher_s_best():
    generator = torch.Generator().manual_seed(0)
    fit = registry.build("top", "llm-context", {"topk": 4}).fit(Shape(4, 7, prefix=1), 0.5, 0)
    received, target = torch.rand(2, 2, 7, generator=generator)
    real = torch.arange(7) < torch.tensor([[7], [3]])
    total = 0.0
    for row, count in ((0, 7), (1, 3)):
        best = sorted(range(count), key=lambda place: -target[row, place].item())[:4]
        pairs = [(received[row, place].item(), count - rank) for rank, place in enumerate(best)]
        pairs += [(0.0, 0)] * (4 - len(pairs))
        total += (
            sum((r - q) * math.log2(1 + math.exp(t - s)) for s, r in pairs for t, q in pairs if r > q) / 16
        )
    assert fit.ranking(received, target, real).item() == pytest.approx(total / 2, rel=1e-5)


def test_top_asks_for_gradients_only_of_attention_whose_ranks_are_distilled():
    fit, real = registry.build("top", "llm-context").fit(Shape(9, 7, prefix=1), 0.5, 0), torch.ones(1, 8) > 0
    query, memory = torch.randn(1, 2, 8, 4, requires_grad=True), {}
    fit.generator = torch.Generator()
    for site in fit.sites:
        view = TokenView(
            torch.ones(1, 8, 1), real, depth=9, real=real, attention=Attention(query, query, query, 1)
        )
        fit.at(site, view, memory)
    assert [received.requires_grad for received in memory["received"]] == [True, True]


STEPS = {"top": {"batch": 8, "epochs": 1.34, "gate_lr": 1.0, "lr": 1e-3, "bins": 8}} | {
    "ltp": {"batch": 8, "epochs": 1, "hard_epochs": 0.34, "threshold_lr": 1e-3, "lr": 1e-3}
}
"""Four steps; of ltp three with soft masks, and one with the tokens gone."""

LEARNED = {"ltp": {"threshold": 3}, "top": {"keep": 2, "worth": 2}}


def learned(method, file, keep=0.6, **more):
    model = encoder()
    with pruned(model, method, keep=keep, fit=str(file), **STEPS[method] | more) as handle:
        return handle.tensors(True), handle, model


@cache
def learned_once(method, file):
    return learned(method, file)


@every_method
def test_a_fit_changes_what_is_stored_and_the_same_seed_gives_the_same_bytes(method, lessons):
    first, handle, model = learned_once(method, lessons)
    again, _, _ = learned(method, lessons)
    assert same(first, again)
    pace = {"ltp": "threshold_lr", "top": "gate_lr"}[method]
    assert not same(first, learned(method, lessons, **{pace: 0.0})[0])
    assert handle.fitted["labels"] == "the data's"
    assert (handle.fitted["steps"], handle.fitted["unit"]) == (4, "texts")
    assert "model.classifier.weight" in first
    assert not any(parameter.requires_grad for parameter in model.parameters())


@every_method
def test_an_interrupted_fit_goes_on_to_the_same_bytes(method, lessons, monkeypatch, tmp_path):
    whole, _, _ = learned_once(method, lessons)
    stage = Stage("llm-context", method, keep=0.6, set=STEPS[method], fit=str(lessons))
    recipe = Recipe(ModelSource("a model in memory"), (stage,))

    def run():
        subject = Subject(encoder(), tokenizer(), Source("a model in memory", "memory", "", "transformers"))
        with pipeline(recipe, stage, Progress()).apply(subject, tmp_path) as handle:
            return handle.tensors(True)

    assert same(interrupted(run, tmp_path, monkeypatch), whole)


@every_method
def test_a_fit_meets_its_budget_on_its_texts(method, lessons):
    _, handle, model = learned(method, lessons, keep=0.5)
    rows = [json.loads(line)["text"] for line in lessons.read_text().splitlines()]
    given = tokenizer()(rows, padding=True, return_tensors="pt")
    own = {"bins": STEPS[method]["bins"]} if "bins" in STEPS[method] else {}
    with pruned(model, method, state=handle.driver.method.state, **own) as again:
        outputs(model, given["input_ids"], given["attention_mask"])
        assert again.achieved().value == pytest.approx(0.5, abs=0.05)


@every_method
def test_a_fit_is_written_and_loaded_again(method, lessons, tmp_path):
    encoder().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    given = [part for name, value in STEPS[method].items() for part in ("--set", f"{name}={value}")]
    asked = ["llm-context", "--method", method, "--keep", "0.6", "--fit", lessons, "--data", lessons, *given]
    report = json.loads(call(*asked, tmp_path / "model", "--out", tmp_path / "out", "--json").stdout)
    assert 0 <= report["pruned"]["accuracy"] <= 1
    assert 0.4 < report["budget"]["achieved"] < 0.8
    assert report["pruned"]["flops"] < report["dense"]["flops"]
    model, probe = tprune.load(tmp_path / "out"), artifact.read_tensors(tmp_path / "out" / artifact.PROBE)
    state = model.tprune_handle.driver.method.state
    assert {name: len(part) for name, part in state.items()} == LEARNED[method]
    assert probe["output"].shape == (3, 5)


def test_what_does_not_fit_is_refused_in_one_line(lessons):
    with pytest.raises(UserError, match=r"--fit built-in\), or give --set final_threshold"):
        pruned(encoder(), "ltp", keep=0.5)
    for method in METHODS:
        with pytest.raises(UserError, match="keep below 1"):
            pruned(encoder(), method, keep=1.0, fit=str(lessons))
    with pytest.raises(UserError, match="top must be trained"):
        pruned(encoder(), "top", keep=0.5)
    with pytest.raises(UserError, match="BertForSequenceClassification is a text encoder, .* use ltp, top"):
        pruned(encoder(), "snapkv", keep=0.5)
    with pytest.raises(UserError, match="LlamaForCausalLM is no text encoder; use a classifier"):
        pruned(decoder(), "ltp", keep=0.5)
    with pytest.raises(UserError, match="has no classifier to fit ltp to"):
        pruned(encoder(head=False), "ltp", keep=0.5, fit=str(lessons))
    with pytest.raises(UserError, match="tokens keep their positions"):
        pruned(encoder(), "ltp", final_threshold=0.1, positions="compact")


def test_methods_of_encoders_alone_run_on_the_built_in_classifier_where_no_model_is_named():
    given = "llm-context", "--method", "ltp", "--set", "final_threshold=0.01", "--dry-run"
    assert "would prune minilm-topics" in call(*given).output
