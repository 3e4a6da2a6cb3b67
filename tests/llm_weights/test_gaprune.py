"""GAPrune: gradients of two sets of triples, and what they make of weights; on decoders and encoders that embed."""

import json

import pytest
import torch

import tprune
from tests.decoders import decoder
from tests.encoders import NAMES, encoder, tokenizer
from tests.golden_values import golden, under
from tests.llm_weights.tiny import prune
from tests.pairs import pair
from tprune.commands.bench import measure
from tprune.data import triples
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.weight_view import LinearView
from tprune.methods.weights import WeightBudget
from tprune.models import text_encoder
from tprune.models.blocks import find_decoder
from tprune.models.embeddings import Contrast, Texts, TripleSets, embedded, pool_of
from tprune.models.source import Source
from tprune.models.subject import Subject
from tprune.pipelines import embedder_weights
from tprune.pipelines.allocation import Sharing
from tprune.pipelines.journal import Journal
from tprune.pipelines.prune_weights import _of_triples
from tprune.pipelines.stream import BlockPruner
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe, Stage

QUIET = Progress(quiet=True)
KINDS = ("domain_square", "domain_mean", "general_square", "general_mean")


@pytest.fixture(scope="module")
def authors():
    return golden("llm-weights", "gaprune")


def built(**settings):
    return registry.build("gaprune", "llm-weights", settings)


def subject(authors):
    """The authors' tiny Qwen3 and both sets of triples."""
    from transformers import Qwen3Config, Qwen3Model

    tensors, told = authors
    model = Qwen3Model(Qwen3Config(**told["settings"]["config"])).eval().requires_grad_(False)
    model.load_state_dict(under(tensors, "model/"))
    method = built()
    sets = {}
    for name in ("domain", "general"):
        rows = [
            row[row != 0] for part in ("query", "positive", "negative") for row in tensors[f"{name}/{part}"]
        ]
        sets[name] = Contrast(
            Texts(rows, [0] * len(rows)), method.pool, method.loss, told["settings"]["batch"]
        )
    return find_decoder(model), TripleSets(**sets)


@pytest.fixture(scope="module")
def gradients(authors):
    return _of_triples(*subject(authors), QUIET)


def test_fisher_information_and_mean_gradients_are_the_authors(authors, gradients):
    tensors, _ = authors
    for name in ("domain", "general"):
        for parameter, fisher in under(tensors, f"fisher/{name}/").items():
            assert torch.allclose(gradients[f"{name}_square"][parameter] + 1e-8, fisher, rtol=1e-3, atol=1e-6)
            mean = tensors[f"mean/{name}/{parameter}"]
            assert torch.allclose(gradients[f"{name}_mean"][parameter], mean, rtol=1e-3, atol=1e-5)


def views(authors, part):
    """The matrices with the authors' figures."""
    tensors, _ = authors
    found, _ = subject(authors)
    found.part = part
    return [matrix for index in range(2) for matrix in found.matrices(index)]


def test_alignment_and_scores_are_the_authors(authors, gradients):
    tensors, told = authors
    matrix = views(authors, "mlp")[0]
    known = {kind: gradients[kind][matrix.parameter_name] for kind in KINDS}
    view = LinearView(matrix.name, 0, matrix.read(), gradients=known)
    aligned = built()._aligned(known["general_mean"], known["domain_mean"])
    assert torch.allclose(aligned, tensors[f"alignment/{matrix.parameter_name}"], rtol=1e-2, atol=1e-6)
    scalar = built(alignment="scalar")._aligned(known["general_mean"], known["domain_mean"])
    assert scalar.item() == pytest.approx(told["settings"]["scalar"][matrix.parameter_name], abs=1e-4)
    assert torch.allclose(built().score(view), tensors["score"], rtol=1e-4)


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("global_s50", {}),
        ("global_s30", {}),
        ("uniform_s50", {"strategy": "block"}),
        ("zscore_s50", {"normalisation": "zscore_sigmoid", "temperature": 0.5}),
        ("minmax_s50", {"normalisation": "minmax"}),
        ("rank_s50", {"normalisation": "rank"}),
        ("weighed_s50", {"beta": 4.0, "gamma": 0.02}),
        ("linear_s50", {"layers": "all"}),
    ],
)
def test_the_weights_that_go_are_the_authors(case, settings, authors, gradients):
    tensors, _ = authors
    method, sparsity = built(**settings), int(case[-2:]) / 100
    found, _ = subject(authors)
    found.part = method.part
    shares = Sharing(found, method.allocation(), method, gradients, QUIET).run(
        sparsity, None, Journal(None, "")
    )
    pruner = BlockPruner(found, method, WeightBudget(sparsity), 0, None, QUIET, shares, gradients)
    pruner.run(Journal(None, ""))
    masks = under(tensors, f"{case}/")
    matrices = [matrix for index in range(2) for matrix in found.matrices(index)]
    assert {matrix.parameter_name for matrix in matrices} >= masks.keys()
    for matrix in matrices:
        gone = matrix.read() == 0
        assert torch.equal(gone, masks.get(matrix.parameter_name, torch.zeros(gone.shape)).bool()), (
            matrix.name
        )


def test_without_gradients_the_order_is_that_of_magnitudes_and_general_worth_lowers_a_score():
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    nothing = dict.fromkeys(KINDS, torch.zeros(6, 8))
    plain = built().score(LinearView("w", 0, weight, gradients=nothing))
    assert torch.equal(plain.flatten().argsort(), weight.abs().flatten().argsort())
    more = nothing | {"general_square": torch.eye(6, 8)}
    assert torch.equal(
        built().score(LinearView("w", 0, weight, gradients=more)) < plain, torch.eye(6, 8).bool()
    )
    normed = built(fisher_norm=True)
    scaled = {kind: 100 * torch.rand(6, 8) if "square" in kind else held for kind, held in nothing.items()}
    small = {kind: held / 100 for kind, held in scaled.items()}
    one, other = (normed.score(LinearView("w", 0, weight, gradients=known)) for known in (scaled, small))
    assert torch.allclose(one, other, rtol=1e-4)


def test_a_batch_embeds_its_own_texts_whatever_their_lengths(authors):
    found, sets = subject(authors)
    texts = sets.domain.texts
    together = embedded(found, texts[:4], built().pool)
    apart = torch.cat([embedded(found, texts[place : place + 1], built().pool) for place in range(4)])
    assert torch.allclose(together, apart, atol=1e-5)
    assert (len(sets.domain), sets.domain.triples, len(list(sets.domain))) == (3, 6, 3)


def test_the_built_in_domain_and_the_rest_share_no_passage():
    domain, general = triples.built_in(True), triples.built_in(False)
    assert len(domain.items) > 100 < len(general.items)
    assert not {item[0] for item in domain.items} & {item[0] for item in general.items}


def file_of(folder, name, letters):
    """A file of triples."""
    rows = [
        {"query": letters[place:] + "a", "positive": letters[place:], "negative": letters[:place] + "z"}
        for place in range(1, 9)
    ]
    file = folder / f"{name}.json"
    file.write_text(json.dumps(rows))
    return str(file)


def test_the_texts_of_both_sets_are_what_an_allocation_looks_at_and_a_plain_pass_is_of(tmp_path):
    domain, general = (file_of(tmp_path, name, name * 4) for name in ("abcd", "wxyz"))
    asked = {"data": domain, "general": general, "calibration": 4, "tokenizer": tokenizer()}
    handle = tprune.prune(decoder(), "gaprune", sparsity=0.5, allocate="owl", **asked)
    assert handle.achieved().value == pytest.approx(0.5, abs=1e-3)
    assert len({row["sparsity"] for row in handle.per_layer()}) > 1
    encoder("bert", False).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    stage = Stage("llm-weights", "gaprune", sparsity=0.5, set={"general": general})
    asked = Recipe(ModelSource(str(tmp_path / "model")), (stage,), data=domain, calibration=4)
    assert measure(asked, 1)["calibration"].startswith("24 x")


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_the_feed_forward_matrices_of_an_encoder_lose_exactly_what_was_asked(name, head, tmp_path):
    model = encoder(name, head)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    handle = tprune.prune(
        model,
        "gaprune",
        sparsity=0.5,
        tokenizer=tokenizer(),
        data=file_of(tmp_path, "domain", "abcdefghijkl"),
        general=file_of(tmp_path, "general", "mnopqrstuvwx"),
        calibration=4,
        batch=2,
    )
    assert handle.achieved().value == 0.5
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert len(changed) == 6
    assert all(("lin" in key) or ("dense" in key and "attention" not in key) for key in changed)


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_embeds_by_all_tokens_the_class_token_too_as_where_it_is_no_method_s_affair(name):
    subject = Subject(encoder(name, False), tokenizer(), Source("in memory", "memory", "", "transformers"))
    items = (("abc", "fghijk", "xy"), ("d", "klm", "zyxw"))
    found = triples.Triples(items, ("find", ""), {})
    given = embedder_weights.encoded(Recipe(ModelSource("in memory"), ()), subject, found, [0, 1])
    pool = pool_of(subject.model, built())
    expected = text_encoder.answers(
        subject.model, text_encoder.encode(subject, ["find; abc", "d", "fghijk", "klm", "xy", "zyxw"], None)
    )
    assert torch.allclose(embedded(find_decoder(subject.model), given, pool), expected, atol=1e-5)


def test_a_domain_s_triples_decide_what_goes(tmp_path):
    one, other = (file_of(tmp_path, name, name * 4) for name in ("abcd", "wxyz"))
    models = encoder("bert", False), encoder("bert", False)
    for model, domain in zip(models, (one, other), strict=True):
        tprune.prune(
            model,
            "gaprune",
            sparsity=0.5,
            tokenizer=tokenizer(),
            data=domain,
            general=one,
            calibration=4,
            gamma=0.01,
        )
    states = [model.state_dict() for model in models]
    assert any(not torch.equal(states[0][key] == 0, states[1][key] == 0) for key in states[0])


def test_what_embeds_no_text_is_refused_in_one_line(text):
    with pytest.raises(UserError, match="T5ForConditionalGeneration has an encoder beside its decoder"):
        prune(pair(), "gaprune", text, sparsity=0.5)
    with pytest.raises(UserError, match="--recover full"):
        prune(decoder(), "gaprune", text, sparsity=0.5, recover="full")
