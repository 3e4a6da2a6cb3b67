"""Surgery on a whole model, against the authors' code on the same tiny Llama (see llm-surgeon.json)."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.decoders import decoder
from tests.golden_values import golden
from tests.llm_weights.tiny import logits, prune
from tprune.core.allocate import cheapest_lines
from tprune.core.kronecker import live_inverse, removal_costs, remove_lines, remove_together
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.weights import WeightBudget
from tprune.models.blocks import find_decoder
from tprune.models.curvature import moments
from tprune.pipelines import whole as pipeline
from tprune.pipelines.journal import Journal
from tprune.pipelines.whole import WholePruner
from tprune.progress import Progress

TENSORS, TOLD = golden("llm-weights", "llm-surgeon")
CASES = TOLD["settings"]["cases"]
LINES, LINES_TOLD = golden("llm-weights", "llm-surgeon-sp")


def dense():
    """The model of the golden file."""
    model = LlamaForCausalLM(LlamaConfig(**TOLD["settings"]["config"])).eval().requires_grad_(False)
    model.load_state_dict({name[6:]: value for name, value in TENSORS.items() if name.startswith("model/")})
    return model


def pruned(model, budget, folder=None, method="llm-surgeon", **settings):
    method = registry.build(method, "llm-weights", settings)
    WholePruner(find_decoder(model), method, budget, TENSORS["ids"], Progress()).run(Journal(folder, "all"))
    return model


def budget(case):
    if case["pattern"]:
        return WeightBudget(1 - case["pattern"][0] / case["pattern"][1], tuple(case["pattern"]))
    return WeightBudget(case["sparsity"])


def test_the_curvature_is_the_authors_up_to_one_factor():
    decoded = find_decoder(dense())
    gathered = moments(decoded, TENSORS["ids"], range(2))
    ratios = []
    for name in (key[2:] for key in TENSORS if key.startswith("G/")):
        inputs, outputs = gathered[int(name.split(".")[2])]
        found = torch.outer(outputs[name].flatten(), inputs[name].result()["gram"].flatten())
        expected = torch.outer(TENSORS[f"G/{name}"].flatten(), TENSORS[f"A/{name}"].flatten())
        ratios.append(found.norm() / expected.norm())
        assert torch.allclose(found / ratios[-1], expected, rtol=1e-3, atol=1e-4 * expected.abs().max())
    assert torch.allclose(ratios[0], ratios[1], rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_weights_are_the_authors(name):
    case = CASES[name]
    model = pruned(dense(), budget(case), shots=case["shots"], together=case["together"], rule="inclusive")
    for key, expected in TENSORS.items():
        if key.startswith(f"{name}/"):
            found = model.get_parameter(key[len(name) + 1 :])
            assert torch.equal(found == 0, expected == 0)
            assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", LINES_TOLD["settings"]["cases"])
def test_rows_and_columns_are_the_authors(name):
    case = LINES_TOLD["settings"]["cases"][name]
    assert all(torch.equal(LINES[key], TENSORS[key]) for key in LINES if key.startswith(("model/", "ids")))
    model = pruned(dense(), WeightBudget(case["sparsity"]), method="llm-surgeon-sp", shots=case["shots"])
    for key in (key for key in LINES if key.startswith(f"{name}/")):
        found = model.get_parameter(key[len(name) + 1 :])
        assert torch.equal(found == 0, LINES[key] == 0)
        assert torch.allclose(found, LINES[key], rtol=1e-3, atol=1e-4)


def test_as_many_rows_and_columns_go_as_fit_and_shared_weights_count_once():
    generator = torch.Generator().manual_seed(5)
    shapes = [(6, 8), (5, 4), (7, 7)]
    costs = [tuple(torch.rand(size, generator=generator) for size in shape) for shape in shapes]
    for count in (0, 7, 40, 80, 117):
        gone = cheapest_lines(costs, count)
        removed = sum(int((rows.unsqueeze(1) | columns).sum()) for rows, columns in gone)
        assert count - 8 < removed <= count
        cost, lines = (torch.cat([part for pair in pairs for part in pair]) for pairs in (costs, gone))
        assert lines.all() or not lines.any() or cost[lines].max() < cost[~lines].min()


def test_of_equal_costs_the_earlier_matrix_and_its_rows_go_first():
    costs = [(torch.zeros(3), torch.zeros(4)), (torch.zeros(2), torch.zeros(2))]
    (rows, columns), other = cheapest_lines(costs, 9)
    assert rows.tolist() == [True, True, False]
    assert not columns.any()
    assert not any(lines.any() for lines in other)


def test_rows_that_go_make_no_other_change_cost_less():
    weight, outer, inner = given()
    rows, columns = torch.arange(6) % 3 == 0, torch.zeros(8, dtype=torch.bool)
    inverses = [torch.linalg.inv(moment) for moment in (outer, inner)]
    change = remove_lines(weight, rows, columns, *inverses) - weight
    gradient = outer @ change @ inner
    assert torch.equal(change[rows], -weight[rows])
    assert gradient[~rows].abs().max() < 1e-4 * gradient.abs().max()
    alone = remove_lines(weight, columns.new_zeros(6), columns | (torch.arange(8) < 3), *inverses) - weight
    gradient = outer @ alone @ inner
    assert gradient[:, 3:].abs().max() < 1e-4 * gradient.abs().max()


def test_moments_that_wait_in_files_change_nothing(tmp_path, monkeypatch):
    whole = pruned(dense(), WeightBudget(0.5), shots=2)
    seen = []
    monkeypatch.setattr(pipeline, "SHARE", 0.0)
    monkeypatch.setattr(pipeline, "moments", lambda *given: (seen.append(list(given[2])), moments(*given))[1])
    paged = pruned(dense(), WeightBudget(0.5), tmp_path, shots=2)
    assert seen == [[0], [1]] * 2
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), paged.parameters(), strict=True))


def test_a_run_goes_on_behind_its_last_round_and_gradients_are_asked_for_as_before(tmp_path, monkeypatch):
    whole = pruned(dense(), WeightBudget(0.5), shots=3)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in whole.parameters())
    write, asked = Journal.write, []

    def interrupted(self, index, tensors):
        write(self, index, tensors)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pruned(dense(), WeightBudget(0.5), tmp_path, shots=3)
    monkeypatch.setattr(Journal, "write", lambda *given: (asked.append(given), write(*given)))
    again = pruned(dense(), WeightBudget(0.5), tmp_path, shots=3)
    assert len(asked) == 2
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))


def given():
    """Weights [6, 8] and two moments of full rank."""
    generator = torch.Generator().manual_seed(3)
    weight, outer, inner = (torch.randn(shape, generator=generator) for shape in ((6, 8), (40, 6), (40, 8)))
    return weight, outer.T @ outer / 40, inner.T @ inner / 40


def test_removed_together_no_other_change_costs_less():
    weight, outer, inner = given()
    every = [torch.ones(len(moment), dtype=torch.bool) for moment in (outer, inner)]
    inverses = [live_inverse(moment, live, 0.0) for moment, live in zip((outer, inner), every, strict=True)]
    mask = removal_costs(weight, *(inverse.diagonal() for inverse in inverses)) < 0.2
    assert 10 < mask.sum() < 40
    losses = []
    for most in (1000, 1):
        change = remove_together(weight, mask, *inverses, most) - weight
        losses.append((change.T @ outer @ change * inner).sum())
        if most == 1000:
            gradient = outer @ change @ inner
            assert gradient[~mask].abs().max() < 1e-4 * gradient.abs().max()
    change = torch.zeros_like(weight).masked_scatter(mask, -weight[mask])
    assert losses[0] < losses[1] < (change.T @ outer @ change * inner).sum()


def test_with_an_identity_at_the_outputs_rows_do_not_touch_and_costs_are_optimal_brain_surgeon_s():
    weight, _, inner = given()
    inverse = torch.linalg.inv(inner)
    costs = removal_costs(weight, torch.ones(6), inverse.diagonal())
    assert torch.allclose(costs, weight.square() / (2 * inverse.diagonal()))
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[2, :4] = True
    found = remove_together(weight, mask, torch.eye(6), inverse, 1000)
    others = torch.arange(6) != 2
    assert torch.equal(found[others], weight[others])


def test_fused_projections_are_pruned_and_stacked_experts_refused(text):
    model = decoder("gpt-neox")
    assert prune(model, "llm-surgeon", text, sparsity=0.5).achieved().value == 0.5
    assert logits(model, TENSORS["ids"]).isfinite().all()
    with pytest.raises(UserError, match="stacked experts"):
        prune(decoder("mixtral"), "llm-surgeon", text, sparsity=0.5)
