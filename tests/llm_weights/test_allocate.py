"""`--allocate`: a budget shared out among matrices, beside any scorer."""

import pytest
import torch

from tests.decoders import decoder, tokens
from tests.golden_values import golden
from tests.llm_weights.tiny import logits, prune
from tprune.core import cosine
from tprune.core.adaptive import likenesses
from tprune.core.allocate import fill_by_score
from tprune.core.statistics import Norm
from tprune.errors import UserError
from tprune.methods import allocate, registry
from tprune.methods.weight_view import LinearView
from tprune.methods.weights import WeightBudget
from tprune.models.blocks import find_decoder
from tprune.models.calibrate import Stream
from tprune.models.outputs import likeness_and_advance


def norm(x):
    statistic = Norm()
    statistic.add(x)
    return statistic.result()["norm"]


def run(tensors, prefix, change):
    """The stub model of the golden values; `change` gives each weight as it is to be, by name, weight and norm."""
    x = tensors["X"]
    for block in range(5):
        first, second = (tensors[f"{prefix}W{block}.{name}"] for name in ("fc1", "fc2"))
        inner = torch.relu(x @ first.T)
        first, second = (
            change(f"W{block}.{name}", weight, norm(given))
            for name, weight, given in (("fc1", first, x), ("fc2", second, inner))
        )
        x = x + torch.tanh(torch.relu(x @ first.T) @ second.T)


@pytest.mark.parametrize("case", ["s50", "s70"])
def test_owl_shares_out_and_wanda_prunes_as_the_authors_do(case):
    tensors, _ = golden("llm-weights", "owl")
    views, wanda, sparsity = [], registry.build("wanda", "llm-weights"), int(case[1:]) / 100

    def note(name, weight, norm):
        views.append(LinearView(name, int(name[1]), weight, norm))
        return weight

    run(tensors, "", note)
    found = allocate.parse("owl").sparsities(lambda: views, wanda, sparsity)
    assert found[::2] == found[1::2] == pytest.approx((1 - tensors[f"{case}.density"]).tolist(), abs=1e-7)
    shares = dict(zip((view.name for view in views), found, strict=True))

    def check(name, weight, norm):
        edit = wanda.prune(LinearView(name, 0, weight, norm), WeightBudget(shares[name]), None)
        pruned = weight.masked_fill(edit.mask, 0)
        assert torch.equal(pruned, tensors[f"{case}.{name}"])
        return pruned

    run(tensors, "", check)


def removed(model):
    found = find_decoder(model)
    matrices = [matrix for index in range(len(found.blocks)) for matrix in found.matrices(index)]
    return [(matrix.read() == 0).double().mean().item() for matrix in matrices]


@pytest.mark.parametrize("rule", ["owl:factor=2,spread=0.2", "erk", "global", "tamp-das"])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_matrices_lose_different_shares_that_add_up_to_the_budget(rule, method, text):
    model = decoder()
    handle = prune(model, method, text, sparsity=0.5, allocate=rule)
    assert len(set(removed(model))) > 1
    assert handle.achieved().value == pytest.approx(0.5, abs=0.03)  # rows lose whole weights, of few


def test_likeness_within_text_is_the_authors():
    tensors, _ = golden("llm-weights", "tamp")
    found = likenesses(cosine.among(tensors["Y"]))
    assert torch.allclose(found, tensors["likeness"].unsqueeze(1), rtol=1e-5)
    assert likenesses(torch.eye(3).unsqueeze(0)).item() == 0


@pytest.mark.parametrize("percent", [30, 50, 70])
def test_weights_are_dealt_out_as_the_authors_do_and_add_up_to_the_budget(percent):
    tensors, told = golden("llm-weights", "tamp")
    sizes, scores, sparsity = told["settings"]["sizes"], told["settings"]["scores"], percent / 100
    found = fill_by_score(scores, sizes, sparsity, sparsity + 0.1)
    assert found == pytest.approx(tensors[f"sparsity_{percent}"].tolist(), abs=0.01)
    kept = [size * (1 - share) for size, share in zip(sizes, found, strict=True)]
    assert kept == pytest.approx([round(count) for count in kept], abs=1e-6)
    assert round(sum(kept)) == int(sum(sizes) * (1 - sparsity) + 1e-9)
    assert max(found) <= sparsity + 0.1


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_likeness_is_of_each_matrix_s_own_outputs_sequence_by_sequence(name):
    model, ids = decoder(name), tokens(3, 20)
    found = find_decoder(model)
    stream = Stream(found, ids, batch_size=2)
    likeness = likeness_and_advance(stream, 0)
    first = found.matrices(0)[0]
    seen = {}
    hook = first.module.register_forward_pre_hook(lambda module, given: seen.update(x=given[0]))
    logits(model, ids)
    hook.remove()
    outputs = seen["x"] @ first.read().T
    if first.module.bias is not None:
        outputs = outputs + (first.module.bias if first.rows is None else first.module.bias[first.rows])
    expected = likenesses(cosine.among(outputs)).mean().item()
    assert likeness[first.name] == pytest.approx((expected,), rel=1e-4)
    assert likeness.keys() == {matrix.name for matrix in found.matrices(0)}


def test_experts_whose_outputs_are_not_seen_are_refused(text):
    with pytest.raises(UserError, match="tamp-das: the outputs of"):
        prune(decoder("mixtral"), "wanda", text, sparsity=0.5, allocate="tamp-das")


def test_magnitudes_under_one_threshold_are_the_smallest_of_the_whole_model(text):
    model, dense = decoder(), find_decoder(decoder())
    prune(model, "magnitude", text, sparsity=0.4, allocate="global")
    weights = torch.cat([m.read().flatten() for i in range(len(dense.blocks)) for m in dense.matrices(i)])
    found = find_decoder(model)
    left = torch.cat([m.read().flatten() for i in range(len(found.blocks)) for m in found.matrices(i)])
    gone = torch.zeros(len(weights), dtype=torch.bool)
    gone[weights.abs().argsort(stable=True)[: round(0.4 * len(weights))]] = True
    assert torch.equal(left == 0, gone)


def test_sparsegpt_takes_owl_s_shares(text):
    model = decoder()
    prune(model, "sparsegpt", text, sparsity=0.5, allocate="owl:factor=2,spread=0.2")
    assert len({round(share, 2) for share in removed(model)}) > 1


def test_nothing_is_shared_out_of_nothing(text):
    model, ids = decoder(), tokens(2, 20)
    before = logits(model, ids)
    prune(model, "wanda", text, sparsity=0.0, allocate="owl")
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize(
    ("method", "budget", "rule", "said"),
    [
        ("wanda", {"pattern": "2:4"}, "owl", "--pattern 2:4 leaves nothing to share out"),
        ("flap", {"sparsity": 0.3}, "erk", "flap shares its budget out itself"),
        ("sparsegpt", {"sparsity": 0.5}, "global", "use owl or erk"),
        ("wanda", {"sparsity": 0.5}, "owls", "expected uniform, global, block, owl, erk or tamp-das"),
        ("wanda", {"sparsity": 0.5}, "owl:width=1", "no hyperparameter 'width'"),
        ("wanda", {"sparsity": 0.5}, "owl:spread=wide", "spread=wide: expected a number"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_in_one_line(method, budget, rule, said, text):
    with pytest.raises(UserError, match="--allocate") as refused:
        prune(decoder(), method, text, allocate=rule, **budget)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
