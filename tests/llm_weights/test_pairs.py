"""Encoders with a decoder beside them (T5, BART) as subjects: both stacks are calibrated and pruned."""

import pytest
import torch

import tprune
from tests.decoders import tokens
from tests.llm_weights.test_contract import MASKING
from tests.llm_weights.tiny import prune
from tests.pairs import NAMES, pair
from tprune.errors import UserError
from tprune.evaluate import perplexity as scoring
from tprune.evaluate.perplexity import perplexity, score_windows
from tprune.methods import registry
from tprune.methods.region import RegionMethod
from tprune.methods.selective import SelectiveMethod
from tprune.models.encoder_decoder import fed, foretold
from tprune.models.find import find_blocks
from tprune.models.gradients import gradient_norms
from tprune.models.masks import MASK
from tprune.models.pair_stream import PairStream
from tprune.pipelines.llm_weights import LlmWeights
from tprune.pipelines.weights_pictures import of_counts, packed

BUILT = {name: registry.build(name, "llm-weights") for name in MASKING}
ABLE = [
    name
    for name, built in BUILT.items()
    if not (built.wraps or isinstance(built, RegionMethod | SelectiveMethod) or "triples" in built.stats)
]


def logits(model, ids):
    """Of the second half of texts int64 [B, L], the first half of which the encoder reads."""
    with torch.no_grad():
        return model(**fed(model, ids), use_cache=False).logits


def inputs_of(model, ids, index):
    """What enters every matrix of one block when the model runs plainly, [T, in] by name."""
    seen = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0].flatten(0, -2)})
        )
        for name, module in find_blocks(model).inputs(index).items()
    ]
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_of_both_stacks_is_in_one_matrix_except_norms_biases_and_positions(name):
    model = pair(name)
    found = find_blocks(model)
    held = {}
    for index in range(len(found.blocks)):
        for matrix in found.matrices(index):
            assert model.get_parameter(matrix.parameter_name) is matrix.parameter
            held[id(matrix.parameter)] = held.get(id(matrix.parameter), 0) + 1
    for parameter_name, parameter in found.blocks.named_parameters():
        free = parameter.dim() == 1 or "relative_attention_bias" in parameter_name
        assert held.get(id(parameter), 0) == (0 if free else 1), parameter_name
    assert [found.block_name(0).split(".")[-3], found.block_name(found.entrances[1])] == [
        "encoder",
        f"{found.names[1]}.0",
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 2])
def test_the_stream_through_both_stacks_equals_the_model(name, rows):
    model, ids = pair(name), tokens(3, 21)
    found, caught = find_blocks(model), []
    hook = found.blocks[-1].register_forward_hook(lambda module, args, out: caught.append(out))
    read = model(**fed(model, ids)).encoder_last_hidden_state
    hook.remove()
    stream = PairStream(found, ids, rows)
    for index in range(len(found.blocks)):
        stream.advance(index)
    last = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
    assert torch.allclose(stream.hidden, torch.cat([read, last], 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_those_of_a_plain_run_with_hooks_and_shared_inputs_are_gathered_once(name):
    model, ids = pair(name), tokens(4, 20)
    found = find_blocks(model)
    stream = PairStream(found, ids, 2)
    for index in range(len(found.blocks)):
        gathered = stream.gather(index, ("norm", "gram"))
        expected = inputs_of(model, ids, index)
        assert gathered.keys() == expected.keys()
        for key, x in expected.items():
            result = gathered[key].result()
            assert torch.allclose(result["norm"], x.norm(dim=0), rtol=1e-4, atol=1e-4), key
            assert torch.allclose(result["gram"], x.T @ x / 2, rtol=1e-3, atol=1e-3), key
            assert gathered[key].tokens == len(x) == 4 * 10
        # q, k and v of a self-attention read the same; a cross-attention's k and v read the encoder.
        groups = 4 if index < found.entrances[1] else 7
        assert len(set(gathered.values())) == groups
        stream.advance(index)


@pytest.mark.parametrize("name", NAMES)
def test_wanda_removes_what_a_plain_computation_over_pruned_blocks_says(name, text, monkeypatch):
    model, naive = pair(name), pair(name)
    taken = []
    take = LlmWeights.calibration_tokens
    monkeypatch.setattr(
        LlmWeights, "calibration_tokens", lambda *given: taken.append(take(*given)) or taken[-1]
    )
    assert prune(model, "wanda", text, sparsity=0.5).achieved().value == 0.5
    found = find_blocks(naive)
    for index in range(len(found.blocks)):
        seen = inputs_of(naive, taken[0], index)
        for matrix in found.matrices(index):
            weight = matrix.parameter
            order = (weight.abs() * seen[matrix.input].norm(dim=0)).argsort(dim=1, stable=True)
            weight.data.scatter_(1, order[:, : weight.shape[1] // 2], 0)
    pruned = {key: value == 0 for key, value in model.state_dict().items()}
    assert all(torch.equal(pruned[key], value == 0) for key, value in naive.state_dict().items())


@pytest.mark.parametrize("method", ABLE)
def test_methods_remove_exactly_what_was_asked_in_both_stacks_and_embeddings_stay(method, text):
    model = pair("t5-gated")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert prune(model, method, text, sparsity=0.25).achieved().value == 0.25
    found, inside = find_blocks(model), set()
    found.part = BUILT[method].part
    for index in range(len(found.blocks)):
        for matrix in found.matrices(index):
            inside.add(matrix.parameter_name)
            assert (matrix.read() == 0).sum() == matrix.shape[0] * matrix.shape[1] / 4
    assert all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items() if key not in inside
    )
    assert logits(model, tokens(2, 12)).isfinite().all()


@pytest.mark.parametrize("allocate", ["owl", "erk", "global", "tamp-das"])
def test_a_budget_is_shared_out_among_both_stacks(allocate, text):
    handle = prune(pair("t5-gated"), "wanda", text, sparsity=0.5, allocate=allocate)
    assert handle.achieved().value == pytest.approx(0.49, abs=0.01)  # short rows
    shares = [row["sparsity"] for row in handle.per_layer()]
    assert len(shares) == 5
    assert max(shares) > min(shares)


def test_a_pattern_holds_in_both_stacks(text):
    handle = prune(pair(), "sparsegpt", text, pattern="2:4")
    assert handle.achieved().details["groups_within_pattern"] == 1


def test_gradients_are_of_the_second_half_alone():
    model, ids = pair("bart"), tokens(2, 16)
    name = "model.decoder.layers.1.encoder_attn.k_proj.weight"
    weight = model.get_parameter(name).requires_grad_()
    squares = 0
    for row in ids.split(1):
        weight.grad = None
        said = model(**fed(model, row)).logits.flatten(0, 1)
        torch.nn.functional.cross_entropy(said, foretold(model, row).flatten()).backward()
        squares = squares + weight.grad.square()
    weight.requires_grad_(False)
    assert torch.allclose(gradient_norms(find_blocks(model), ids)[name], squares.sqrt(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_perplexity_is_of_the_second_half_and_its_own_tokens_are_not_seen_before_they_are_foretold(name):
    model, ids = pair(name), tokens(3, 15)
    losses, predictions = score_windows(model, ids, 2)
    said = logits(model, ids)
    expected = said.log_softmax(-1).gather(2, ids[:, 7:, None])[..., 0]
    assert torch.allclose(losses, -expected, atol=1e-4)
    assert torch.equal(predictions, said.argmax(-1))
    assert perplexity(losses) == pytest.approx(float((-expected.double()).mean().exp()), rel=1e-4)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 90 + 2
    assert torch.allclose(logits(model, changed), said, atol=1e-5)


@pytest.mark.parametrize(
    "method", ["flap", "shortgpt", "armor", "wanda-pp", "llm-surgeon", "movement", "kcm"]
)
def test_methods_that_would_see_one_stack_alone_are_refused_in_one_line(method, text):
    fitted = {"fit": "built-in"} if method == "movement" else {}
    with pytest.raises(
        UserError, match="T5ForConditionalGeneration has an encoder beside its decoder"
    ) as said:
        prune(pair(), method, text, sparsity=0.5, **fitted)
    assert "\n" not in str(said.value)


def test_cache_methods_are_refused_in_one_line():
    with pytest.raises(UserError, match="BartForConditionalGeneration has an encoder beside its decoder"):
        tprune.prune(pair("bart"), "snapkv", keep=0.5)


@pytest.mark.parametrize(
    ("name", "how"), [("t5", "full:epochs=2,lr=0.01"), ("bart", "lora:epochs=2,lr=0.01")]
)
def test_recovery_foretells_the_second_halves_and_keeps_the_zeros(name, how, text):
    model = pair(name)
    handle = prune(model, "wanda", text, sparsity=0.5, recover=how)
    first, last = handle.recovered["losses"]["next token"]
    assert last < first
    found = find_blocks(model)
    for index in range(len(found.blocks)):
        for matrix in found.matrices(index):
            assert (matrix.read() == 0).float().mean() == 0.5


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_states_of_both_stacks_in_a_file_are_those_in_memory(name, tmp_path):
    found, ids = find_blocks(pair(name)), tokens(5, 21)
    held, spilled = (PairStream(found, ids, 2, folder) for folder in (None, tmp_path))
    for index in range(len(found.blocks)):
        for stream in (held, spilled):
            stream.advance(index)
    assert torch.allclose(spilled.hidden.read(0, 5), held.hidden, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_logits_come_a_run_of_positions_at_a_time(name, monkeypatch):
    model, ids = pair(name), tokens(2, 21)
    expected = logits(model, ids)
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 2 * 4 * expected.shape[-1])
    with torch.no_grad():
        parts = list(scoring.logits_in_parts(model, ids))
    assert [first for first, _ in parts] == [9, 13, 17]
    assert torch.allclose(torch.cat([part for _, part in parts], 1), expected, atol=1e-6)


def test_a_picture_has_a_row_for_every_block_the_encoder_s_first(text):
    handle = prune(pair(), "magnitude", text, sparsity=0.5)
    counts = [(name, index + 1, 10) for index, name in enumerate(("decoder.block.0.q", "encoder.block.0.q"))]
    assert of_counts(counts).blocks == [0.2, 0.1]
    masks = (name for name in handle.edits if name.startswith(MASK))
    found = of_counts(packed(masks, MASK, handle.edits.__getitem__))
    assert len(found.blocks) == 5
    assert found.blocks == pytest.approx([0.5] * 5)


def test_a_decoder_whose_first_token_is_not_known_is_refused(text):
    with pytest.raises(UserError, match="T5ForConditionalGeneration has no decoder_start_token_id"):
        prune(pair(decoder_start_token_id=None), "wanda", text, sparsity=0.5)
