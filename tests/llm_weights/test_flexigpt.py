"""FlexiGPT: blocks that borrow weights compute what they should, are stored once and learn."""

import copy

import pytest
import torch

import tprune
from tests.decoders import decoder, tokens
from tests.llm_weights.test_artifacts import QUIET, recipe
from tests.llm_weights.test_recover import FEW
from tests.llm_weights.tiny import logits, prune, save, stepwise_logits
from tprune.core.low_rank import LowRankMap, gap
from tprune.core.weights import Shared, StructureEdit
from tprune.errors import BudgetError, UserError
from tprune.models import shapes
from tprune.models.blocks import find_decoder
from tprune.models.shared import SharedLinear, borrows, share
from tprune.pipelines.run import execute


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gpt2", "opt"])
def test_with_the_whole_difference_a_borrowing_block_is_what_it_was(name):
    dense, ids = decoder(name), tokens(2, 20)
    for place, block in enumerate(find_decoder(dense).blocks):
        for parameter in (p for n, p in block.named_parameters() if n.endswith("bias")):
            parameter.data.add_(0.1 * place)
    model = copy.deepcopy(dense)
    share(find_decoder(model), 1, Shared(0, 48, None))
    expected = logits(dense, ids)
    assert (logits(model, ids) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (stepwise_logits(model, ids) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    owned = [name for name, _ in find_decoder(model).blocks[1].named_parameters(remove_duplicate=False)]
    assert all(name.endswith((".down", ".up", "norm.weight", "bias")) or "ln_" in name for name in owned)


def test_with_a_scale_of_zero_a_borrowing_block_is_no_block():
    model, ids = decoder(), tokens(2, 20)
    without = copy.deepcopy(model)
    share(find_decoder(model), 1, Shared(2, 4, 0.0))
    shapes.apply(find_decoder(without), [StructureEdit(1, removed=True)])
    assert torch.allclose(logits(model, ids), logits(without, ids), atol=1e-5)


def test_the_gap_is_what_a_difference_of_the_rank_leaves():
    draw = torch.Generator().manual_seed(0)
    one, other = (LowRankMap.best(torch.randn(20, 30, generator=draw), 5) for _ in range(2))
    size = torch.linalg.svdvals(one.up @ one.down - other.up @ other.down)
    assert torch.allclose(gap(one, other, 5), size[5:].norm(), rtol=1e-4)
    assert gap(one, other, 10) < 1e-4
    assert gap(one, one, 1) < 1e-4


def test_a_block_borrows_from_its_twin(text):
    def pair(model):
        found = find_decoder(model)
        prune(model, "flexigpt", text, sparsity=0.25)
        return next((i, borrows(found, i).base) for i in range(4) if borrows(found, i))

    gone, base = pair(decoder(num_hidden_layers=4))
    twin = next(i for i in range(4) if i not in (gone, base))
    model = decoder(num_hidden_layers=4)
    blocks = model.model.layers
    for name, parameter in blocks[twin].named_parameters():
        parameter.data.copy_(blocks[gone].get_parameter(name))
    assert set(pair(model)) == {gone, twin}


def test_differences_and_scales_learn_and_what_is_lent_stays_one_tensor(text):
    model = decoder()
    before = sum(p.numel() for p in model.parameters())
    handle = prune(model, "flexigpt", text, sparsity=0.3, recover=FEW["full"])
    assert sum(p.numel() for p in model.parameters()) < 0.85 * before
    layers = [module for module in model.modules() if isinstance(module, SharedLinear)]
    assert len(layers) == 7
    scales = [layer.scale for layer in layers if layer.scale is not None]
    assert len(scales) == 2
    assert all((scale != 0.01).any() for scale in scales)
    first, last = handle.recovered["losses"]["next token"]
    assert last < first


def test_a_model_whose_blocks_borrow_is_masked_like_any_other_and_loses_no_structure(text):
    model = decoder()
    prune(model, "flexigpt", text, sparsity=0.3)
    assert prune(model, "wanda", text, sparsity=0.5).achieved().value == 0.5
    with pytest.raises(UserError, match="shortgpt removes structure; do that before they borrow"):
        prune(model, "shortgpt", text, sparsity=0.3)


def test_a_gpt2_whose_blocks_borrow_is_loaded_as_it_was_written(text, tmp_path):
    source, ids = save(tmp_path / "model", "gpt2"), tokens(2, 20)
    execute(recipe(source, text, "flexigpt"), QUIET, out=str(tmp_path / "out"), evaluate=False)
    model = decoder("gpt2")
    prune(model, "flexigpt", text, sparsity=0.34)
    assert torch.allclose(logits(tprune.load(str(tmp_path / "out")), ids), logits(model, ids), atol=1e-6)
    layer = next(module for module in model.modules() if isinstance(module, SharedLinear))
    x = torch.randn(3, len(layer.weight), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(layer(x), x @ layer.weight + layer.bias, atol=1e-5)


def test_blocks_that_are_narrower_than_the_configuration_says_borrow_from_their_like(text):
    model, ids = decoder("gpt2"), tokens(2, 20)
    narrow = {"heads": torch.tensor([1]), "channels": torch.arange(0, 48, 2)}
    shapes.apply(find_decoder(model), [StructureEdit(index, keep=narrow) for index in (0, 1)])
    with pytest.raises(UserError, match="no block that stays has the shape of block 2"):
        prune(copy.deepcopy(model), "flexigpt", text, sparsity=0.3)
    shapes.apply(find_decoder(model), [StructureEdit(2, keep=narrow)])
    prune(model, "flexigpt", text, sparsity=0.3)
    rows, fresh = model.config.tprune["layers"], decoder("gpt2")
    shapes.resize(find_decoder(fresh), rows)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh, ids), logits(model, ids))


def test_a_rank_that_saves_nothing_is_refused(text):
    with pytest.raises(BudgetError, match="differences of rank 40 save 0 to 0"):
        prune(decoder(), "flexigpt", text, sparsity=0.3, rank=40)
