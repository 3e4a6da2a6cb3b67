"""Every kind of decoder: fused, transposed, interleaved and stacked storage, sliding windows, experts."""

import copy

import pytest
import torch

from tests.decoders import decoder, tokens
from tests.llm_weights.tiny import EXPERTS, NAMES, logits, prune, stepwise_logits
from tprune.core.mask import smallest_mask
from tprune.errors import UserError
from tprune.methods import registry
from tprune.models import units
from tprune.models.blocks import find_decoder
from tprune.models.calibrate import Stream

DENSE = [name for name in NAMES if name not in EXPERTS]


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_of_the_blocks_is_in_exactly_one_matrix_except_norms_biases_and_routers(name):
    found = find_decoder(decoder(name))
    for index, block in enumerate(found.blocks):
        seen = {id(p): torch.zeros(p.shape) for p in block.parameters()}
        for matrix in found.matrices(index):
            held = seen[id(matrix.parameter)]
            view = held if matrix.expert is None else held[matrix.expert]
            view = view.t() if matrix.transposed else view
            rows = slice(None) if matrix.rows is None else matrix.rows
            view[rows] += 1
        for parameter_name, parameter in block.named_parameters():
            free = parameter.dim() == 1 or parameter_name.split(".")[-2] in ("gate", "shared_expert_gate")
            assert (seen[id(parameter)] == (0 if free else 1)).all(), parameter_name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_half_of_every_matrix_goes_and_routers_stay(name, method, text):
    model = decoder(name)
    routers = {
        n: p.clone()
        for n, p in model.named_parameters()
        if n.endswith(("mlp.gate.weight", "expert_gate.weight"))
    }
    handle = prune(model, method, text, sparsity=0.5)
    assert handle.achieved().value == 0.5
    assert all(torch.equal(model.get_parameter(n), p) for n, p in routers.items())
    assert bool(routers) == (name in EXPERTS)
    assert logits(model, tokens(2, 12)).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_calibration_stream_through_all_blocks_equals_the_model(name):
    model, ids = decoder(name), tokens(3, 20)
    found = find_decoder(model)
    caught = []
    hook = found.blocks[-1].register_forward_hook(lambda module, args, out: caught.append(out))
    logits(model, ids)
    hook.remove()
    stream = Stream(found, ids, batch_size=2)
    for index in range(len(found.blocks)):
        stream.advance(index)
    last = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
    assert torch.allclose(stream.hidden, last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_those_of_every_matrix_s_true_inputs(name):
    model, ids = decoder(name), tokens(3, 20)
    found = find_decoder(model)
    expected = {}
    hooks = [
        module.register_forward_hook(
            lambda module, args, out, key=key: expected.setdefault(key, []).append(args[0].flatten(0, -2))
        )
        for key, module in found.inputs(1).items()
        if not hasattr(module, "gate_up_proj")
    ]
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    stream = Stream(found, ids, batch_size=2)
    stream.advance(0)
    inputs = stream.gather(1, ("norm", "gram"))
    for key, parts in expected.items():
        x = torch.cat(parts)
        assert inputs[key].tokens == 60
        assert torch.allclose(inputs[key].result()["norm"], x.norm(dim=0), rtol=1e-3)
        assert torch.allclose(inputs[key].result()["gram"], x.T @ x * (2 / 3), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_what_feeds_the_channels_of_an_mlp_knows_who_reads_them(name):
    found = find_decoder(decoder(name))
    whole = found.matrices(1)
    found.part = "mlp"
    part = found.matrices(1)
    readers = {matrix.reader for matrix in part if matrix.reader}
    read = {matrix.input: matrix.shape[1] for matrix in part if not matrix.reader}
    assert read.keys() == readers
    assert all(matrix.shape[0] == read[matrix.reader] for matrix in part if matrix.reader)
    attention = [matrix.name for matrix in whole if matrix.name not in {one.name for one in part}]
    assert attention
    assert all("att" in name for name in attention)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_together_see_every_token_as_often_as_it_is_routed(name):
    model, ids = decoder(name), tokens(3, 20)
    found = find_decoder(model)
    inputs = Stream(found, ids, batch_size=2).gather(0, ("norm",))
    for end in (".in", ".out"):
        assert sum(seen.tokens for key, seen in inputs.items() if key.endswith(end)) == 60 * 2


def test_an_expert_that_saw_no_token_is_pruned_by_magnitude_and_named(text, capsys):
    model = decoder("mixtral")
    first = find_decoder(model).blocks[0].mlp
    first.gate.weight.zero_()  # all experts are equally good: the same two get every token
    before = first.experts.down_proj.clone()
    prune(model, "wanda", text, sparsity=0.5)
    by_magnitude = torch.where(smallest_mask(before.abs(), before.shape[-1] // 2), 0, before)
    same = [torch.equal(first.experts.down_proj[expert], by_magnitude[expert]) for expert in range(4)]
    assert sum(same) == 2
    assert "saw fewer than 128 calibration tokens: model.layers.0.mlp.experts" in capsys.readouterr().err


@pytest.mark.parametrize("name", DENSE)
def test_slicing_heads_and_channels_equals_zeroing_them_also_through_the_cache(name, text):
    model, ids = decoder(name), tokens(2, 20)
    masked = copy.deepcopy(model)
    handle = prune(model, "flap", text, sparsity=0.3, compensate=False)
    found = find_decoder(masked)
    for edit_name, keep in handle.tensors(by_reference=True).items():
        if edit_name.startswith("keep/"):
            block, kind = edit_name.removeprefix("keep/").split(".")
            place = units.site(found, int(block), kind)
            gone = torch.ones(place.count, place.width, dtype=torch.bool)
            gone[keep] = False
            columns = place.reader.weight if units.is_transposed(place.reader) else place.reader.weight.T
            columns[gone.flatten()] = 0
    expected = logits(masked, ids)
    scale = expected.abs().max()
    assert (logits(model, ids) - expected).abs().max() < 2e-5 * scale
    assert (stepwise_logits(model, ids) - expected).abs().max() < 2e-5 * scale


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_a_block_decodes_through_its_cache_as_it_does_without(name, text):
    model, ids = decoder(name), tokens(2, 20)
    prune(model, "shortgpt", text, sparsity=0.34)
    assert len(find_decoder(model).blocks) == 2 == model.config.num_hidden_layers
    expected = logits(model, ids)
    assert (stepwise_logits(model, ids) - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("name", EXPERTS)
def test_channels_of_experts_are_refused_by_name(name, text):
    with pytest.raises(UserError, match="flap does not fit this model: the channels"):
        prune(decoder(name), "flap", text, sparsity=0.3)


def test_compensation_is_exact_where_removed_inputs_are_constant():
    method = registry.build("flap", "llm-weights")
    from tprune.methods.weight_view import BlockView, ModelView, UnitView
    from tprune.methods.weights import WeightBudget

    torch.manual_seed(0)
    x = torch.randn(50, 8)
    x[:, :4] = torch.randn(4)  # constant inputs
    weight = torch.randn(6, 8)
    unit = UnitView("channels", weight, 1, 1, 10, mean=x.mean(0), variance=x.var(0), fluctuation=x.var(0))
    (edit,) = method.plan(ModelView([BlockView(0, 80, {"channels": unit})]), WeightBudget(0.5))
    keep = edit.keep["channels"]
    assert keep.tolist() == [4, 5, 6, 7]
    assert torch.allclose(x[:, keep] @ weight[:, keep].T + edit.bias["channels"], x @ weight.T, atol=1e-5)
