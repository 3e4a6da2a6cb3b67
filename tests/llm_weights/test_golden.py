"""Against the authors' own code, on the same weights and inputs (see tests/golden/llm-weights/*.json)."""

import pytest
import torch
from torch import nn

from tests.decoders import decoder
from tests.golden_values import golden
from tprune.core import solve
from tprune.core.mask import cumulative_mask, inclusive_mask, nm_mask
from tprune.core.statistics import Gram, Moments, Norm, token_cosine
from tprune.methods import registry
from tprune.methods.weight_view import BlockView, LinearView, ModelView, UnitView
from tprune.methods.weights import WeightBudget
from tprune.models.blocks import find_decoder
from tprune.models.calibrate import Stream
from tprune.pipelines.journal import Journal
from tprune.pipelines.removal import Removal
from tprune.progress import Progress

PATTERNS = {"W_2_4": (2, 4), "W_4_8": (4, 8), "W_keep1_4": (1, 4)}


def statistic(kind, x):
    """One sequence at a time, as the authors feed them."""
    made = kind()
    for sequence in x.float():
        made.add(sequence.unsqueeze(0))
    return made.result()


def budget(case):
    if case in PATTERNS:
        keep, group = PATTERNS[case]
        return WeightBudget(1 - keep / group, (keep, group))
    return WeightBudget(int(case[-2:]) / 100)


def pruned(method, weight, case, **known):
    own = {name: tensor.clone() for name, tensor in known.items()}
    edit = registry.build(*method).prune(LinearView("w", 0, weight.clone(), **own), budget(case), None)
    return torch.where(edit.mask, 0.0, weight if edit.weight is None else edit.weight)


@pytest.mark.parametrize("case", ["W_s50", "W_s30", "W_2_4", "W_4_8", "W_keep1_4"])
def test_wanda_removes_the_authors_weights(case):
    tensors, _ = golden("llm-weights", "wanda")
    norm = statistic(Norm, tensors["X"])["norm"]
    assert torch.equal(pruned(("wanda", "llm-weights"), tensors["W"], case, norm=norm), tensors[case])


def test_wanda_scores_are_the_authors_up_to_the_number_of_sequences():
    tensors, _ = golden("llm-weights", "wanda")
    norm = statistic(Norm, tensors["X"])["norm"]
    assert torch.allclose(norm.square() / 5, tensors["scaler_row"], rtol=1e-5)
    assert torch.allclose(tensors["W"].abs() * norm / 5**0.5, tensors["score"], rtol=1e-5)


def test_wanda_variant_removes_the_authors_weights():
    tensors, _ = golden("llm-weights", "wanda")
    score = tensors["W"].abs() * statistic(Norm, tensors["X"])["norm"]
    assert torch.equal(cumulative_mask(score, 0.5), tensors["W_variant_s50"] == 0)


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("layer_s50", {}),
        ("layer_s30", {}),
        ("row_s50", {"group": "row"}),
        ("row_s50_a1", {"group": "row", "power": 1.0}),
        ("row_s50_a0", {"group": "row", "power": 0.0}),
        ("row_2_4", {}),
    ],
)
def test_ria_removes_the_authors_weights(case, settings):
    tensors, _ = golden("llm-weights", "ria")
    norm = statistic(Norm, tensors["X"])["norm"]
    asked = {"row_2_4": "W_2_4", "layer_s30": "W_s30"}.get(case, "W_s50")
    gone = pruned(("ria", "llm-weights", settings), tensors["W"], asked, norm=norm) == 0
    authors = tensors[case] == 0
    assert not (gone & ~authors).any()
    assert (authors & ~gone).sum() == (1 if case.startswith("layer") else 0), "their threshold takes one more"


def test_wanda_feeds_the_second_block_with_the_pruned_first():
    tensors, _ = golden("llm-weights", "wanda")
    x = tensors["X"]
    for name in ("W1", "W2"):
        norm = statistic(Norm, x)["norm"]
        weight = pruned(("wanda", "llm-weights"), tensors[name], "W_s50", norm=norm)
        assert torch.equal(weight, tensors[f"{name}_s50"])
        x = x + torch.tanh(x @ weight.T)


@pytest.mark.parametrize("case", ["s50", "s30", "2_4", "4_8"])
def test_dass_removes_the_authors_weights_block_after_block(case):
    tensors, _ = golden("llm-weights", "dass")
    method, x = ("dass", "llm-weights"), tensors["X"]
    for block in range(2):
        names = ("gate", "up", "down")
        dense = [tensors[f"W{block}.mlp.{name}_proj"] for name in names]
        x = x + torch.tanh(x @ tensors[f"W{block}.q_proj"].T)
        channels = torch.nn.functional.silu(x @ dense[0].T) * (x @ dense[1].T)
        norm, channel_norm = (statistic(Norm, part)["norm"] for part in (x, channels))
        gate, up, down = (
            pruned(method, dense[0], f"W_{case}", norm=norm, channel_norm=channel_norm),
            pruned(method, dense[1], f"W_{case}", norm=norm, channel_norm=channel_norm),
            pruned(method, dense[2], f"W_{case}", norm=channel_norm),
        )
        for name, found in zip(names, (gate, up, down), strict=True):
            assert torch.equal(found, tensors[f"{case}.W{block}.mlp.{name}_proj"])
        x = x + (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


@pytest.mark.parametrize("case", ["W_s50", "W_s30", "W_2_4", "W_4_8"])
def test_magnitude_removes_the_authors_weights(case):
    tensors, _ = golden("llm-weights", "magnitude")
    method = ("magnitude", "llm-weights", {"rule": "inclusive"})
    assert torch.equal(pruned(method, tensors["W"], case), tensors[case])


def test_magnitude_removes_all_ties_at_the_threshold_only_under_the_inclusive_rule():
    tensors, _ = golden("llm-weights", "magnitude")
    weight, expected = tensors["W_ties"], tensors["W_ties_s50"]
    assert torch.equal(torch.where(inclusive_mask(weight.abs(), weight.numel() // 2), 0, weight), expected)
    exact = registry.build("magnitude", "llm-weights").prune(
        LinearView("w", 0, weight), WeightBudget(0.5), None
    )
    assert exact.mask.sum() == weight.numel() // 2


@pytest.mark.parametrize("case", ["W_s50", "W_2_4", "W_4_8"])
def test_sparsegpt_gives_the_authors_weights(case):
    tensors, _ = golden("llm-weights", "sparsegpt")
    gram = statistic(Gram, tensors["X"])["gram"]
    assert torch.allclose(gram.diagonal(), tensors["H_diag"], rtol=1e-4)
    method = ("sparsegpt", "llm-weights", {"rule": "inclusive"})
    found = pruned(method, tensors["W"].float(), case, gram=gram)
    assert torch.equal(found == 0, tensors[case] == 0)
    assert torch.allclose(found, tensors[case], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", ["s50", "2_4", "block16_s50", "keep1_4"])
def test_sparsegpt_treats_dead_inputs_as_the_authors_do(case):
    tensors, _ = golden("llm-weights", "sparsegpt")
    gram = statistic(Gram, tensors["X_dead"])["gram"]
    settings = {"rule": "inclusive", "block": 16 if case.startswith("block16") else 128}
    name = f"W_{case.removeprefix('block16_')}"
    found = pruned(("sparsegpt", "llm-weights", settings), tensors["W_dead"].float(), name, gram=gram)
    expected = tensors[f"W_dead_{case}"]
    assert torch.equal(found == 0, expected == 0)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_sparsegpt_s_exact_rule_removes_exactly_the_count_in_every_block():
    tensors, _ = golden("llm-weights", "sparsegpt")
    gram = statistic(Gram, tensors["X"])["gram"]
    found = pruned(("sparsegpt", "llm-weights"), tensors["W"].float(), "W_s50", gram=gram)
    assert [(part == 0).sum().item() for part in found.split(128, dim=1)] == [768, 192]
    assert ((found == 0) != (tensors["W_s50"] == 0)).sum() < 10


@pytest.mark.parametrize("case", ["W_s50", "W_s70", "W_s90", "W_2_4", "W_4_8", "W_keep1_4"])
def test_alps_gives_the_authors_weights(case):
    tensors, _ = golden("llm-weights", "alps")
    gram = statistic(Gram, tensors["X"])["gram"]
    found = pruned(("alps", "llm-weights"), tensors["W"], case, gram=gram)
    assert torch.equal(found == 0, tensors[case] == 0)
    assert torch.allclose(found, tensors[case], rtol=1e-4, atol=1e-5)


def test_alps_loses_less_of_the_output_than_sparsegpt_and_has_no_gradient_left_on_what_stays():
    tensors, _ = golden("llm-weights", "alps")
    gram, weight = statistic(Gram, tensors["X"])["gram"], tensors["W"]
    methods = (
        ("alps", "llm-weights", {"refine": 40}),
        ("sparsegpt", "llm-weights"),
        ("magnitude", "llm-weights"),
    )
    for case in ("W_s70", "W_2_4"):
        found = [pruned(method, weight, case, gram=gram) for method in methods]
        gradients = [(weight - new) @ gram for new in found]
        losses = [
            (gradient * (weight - new)).sum().item() for gradient, new in zip(gradients, found, strict=True)
        ]
        assert losses == sorted(losses)
        damped = gradients[0] + 0.01 * gram.diagonal().mean() * (weight - found[0])
        assert damped[found[0] != 0].abs().max() < 1e-3 * damped.abs().max()


def test_flap_accumulates_the_authors_mean_and_fluctuation():
    tensors, _ = golden("llm-weights", "flap")
    found = statistic(Moments, tensors["stat.X"])
    assert torch.allclose(found["mean"], tensors["stat.mean"].float(), atol=1e-5)
    assert torch.allclose(found["fluctuation"], tensors["stat.fluctuation"].float(), rtol=1e-4)
    x = tensors["stat.X"].float().flatten(0, 1)
    assert torch.allclose(found["variance"], x.var(0), rtol=1e-4)


@pytest.mark.parametrize("metric", ["IFV", "WIFV", "WIFN"])
def test_flap_scores_channels_as_the_authors_do(metric):
    tensors, _ = golden("llm-weights", "flap")
    x, weight = tensors["stat.X"], tensors["stat.W"].float()
    unit = UnitView("channels", weight, 1, 1, 1, **statistic(Moments, x), **statistic(Norm, x))
    method = registry.build("flap", "llm-weights", {"metric": metric.lower(), "fluctuation": "running"})
    found = method.columns(unit) / (len(x) ** 0.5 if metric == "WIFN" else 1)
    assert torch.allclose(found, tensors[f"stat.{metric}.score"].float(), rtol=1e-3)


@pytest.mark.parametrize("case", ["alam_20", "alam_50", "alam_50_ifv", "alam_30_wifn", "ulum_25"])
def test_flap_keeps_the_authors_heads_and_neurons(case):
    tensors, told = golden("llm-weights", "flap")
    setting = told["settings"]["cases"][case]
    blocks = []
    for layer in range(2):
        units = {}
        for kind, name, width, cost in (("heads", "o", 128, 170), ("channels", "down", 1, 1)):
            x, weight = (
                tensors[f"model.layer{layer}.{name}_in"],
                tensors[f"model.layer{layer}.{name}_weight"].float(),
            )
            units[kind] = UnitView(
                kind, weight, width, 1, cost, **statistic(Moments, x), **statistic(Norm, x)
            )
        blocks.append(BlockView(layer, 4 * 170 + 80, units))
    method = registry.build(
        "flap",
        "llm-weights",
        {
            "metric": setting["metrics"].lower(),
            "structure": setting["structure"].lower(),
            "fluctuation": "running",
            "rule": "strict",
        },
    )
    for edit in method.plan(ModelView(blocks), WeightBudget(setting["pruning_ratio"])):
        for kind, name, reader in (("heads", "heads", "o"), ("channels", "neurons", "down")):
            kept = tensors[f"{case}.{name}"][edit.block].nonzero().flatten()
            assert torch.equal(edit.keep[kind], kept)
            bias = tensors[f"{case}.{reader}_bias{edit.block}"].float()
            assert torch.allclose(edit.bias[kind], bias, atol=5e-3)


@pytest.mark.parametrize("case", ["bi", "angular_n3", "angular_n2"])
def test_shortgpt_removes_the_blocks_of_the_re_implementation(case):
    tensors, told = golden("llm-weights", "shortgpt")
    hidden = tensors["hidden"].float()  # [L + 1, calls, B, T, D]
    stream = hidden.flatten(1, 2)
    blocks = [
        BlockView(
            layer,
            1,
            similarity=token_cosine(hidden[layer], hidden[layer + 1]).mean().item(),
            entering=stream[layer][:, -1],
            leaving=stream[layer + 1][:, -1],
        )
        for layer in range(8)
    ]
    setting = told["settings"]["cases"][case]
    metric = "angular" if setting["angular"] else "influence"
    method = registry.build("shortgpt", "llm-weights", {"metric": metric})
    edits = method.plan(ModelView(blocks), WeightBudget(setting["n_prune_layers"] / 8))
    assert [edit.block for edit in edits] == sorted(tensors[f"{case}.removed"].tolist())
    if case == "bi":
        influence = torch.tensor([1 - block.similarity for block in blocks])
        assert torch.allclose(influence * 28, tensors["bi.importance"].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["barriers", "free"])
def test_sleb_removes_the_authors_blocks_at_the_authors_losses(case, tmp_path):
    tensors, told = golden("llm-weights", "sleb")
    stream = Stream(find_decoder(decoder(num_hidden_layers=8)), tensors["tokens"], batch_size=3)
    setting = told["settings"]["cases"][case]
    method = registry.build(
        "sleb", "llm-weights", {name: setting[name] for name in ("early_barrier", "latter_barrier")}
    )
    budget, found = WeightBudget(setting["num_remove_blocks"] / 8), []

    def search(folder):
        removal = Removal(stream, Journal(folder, "losses"), Progress(quiet=True))
        blocks = [BlockView(index, 1) for index in range(8)]
        found.clear()

        def losses_with(made, candidates):
            found.append(([edit.block for edit in made], removal(made, candidates)))
            return found[-1][1]

        return [edit.block for edit in method.plan(ModelView(blocks, False, losses_with), budget)]

    removed = search(tmp_path)
    assert removed == setting["removed"]
    assert [gone for gone, _ in found] == [setting["removed"][:done] for done in range(len(found))]
    # The authors sum 24 times the mean of 23 losses over 4 windows.
    assert torch.allclose(
        torch.cat([losses for _, losses in found]) * 96, tensors[f"{case}.losses"], rtol=1e-5
    )
    stream.run = None
    assert search(tmp_path) == removed, "answers come from the journal when a search is started again"


def test_sparsegpt_loses_less_of_the_output_than_the_same_mask_without_update():
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, bias=False)
    x = torch.randn(400, 64) @ torch.randn(64, 64)
    gram = x.T @ x
    weight = layer.weight.detach()

    def loss(new):
        return ((weight - new) @ gram * (weight - new)).sum()

    factor = solve.inverse_factor(gram, 0.01)
    updated, mask = solve.obs_prune(weight, factor, lambda score: nm_mask(score, 2, 4), group=4)
    assert loss(updated) < loss(weight.masked_fill(mask, 0))
    wanda = nm_mask(weight.abs() * gram.diagonal().sqrt(), 2, 4)
    assert loss(updated) < loss(weight.masked_fill(wanda, 0))
