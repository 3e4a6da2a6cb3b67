"""Position ids at the projector and inside the decoder, where a paper renumbers at one of them only."""

import pytest
import torch

import tprune
from tests.vlm.tiny import tiny
from tprune.models.prompts import noise_prompts

SETTINGS = {"todre": {"tau": 1.0}, "vflowopt": {"decoder": (0.5, 0.5)}}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def numbered(kind, method, positions):
    """Position ids in every layer, of a prompt and of one token behind it; what is reported; and what is left there."""
    model, seen = tiny(kind), []
    inputs = noise_prompts(model, 1, 0)

    def look(module, args, kwargs):
        ids, hidden = kwargs["position_ids"], args[0] if args else kwargs["hidden_states"]
        expected = core.rotary_emb(hidden, ids)
        assert all(map(torch.equal, kwargs["position_embeddings"], expected))
        seen.append(ids)

    with tprune.prune(model, f"vlm/{method}", positions=positions, **SETTINGS[method]) as handle:
        core = handle.driver.core
        hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in core.layers]
        model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0)
        for hook in hooks:
            hook.remove()
        said = handle.achieved().details["positions"]
        kept = handle.driver.tally.owner[0] >= 0
    depth = len(core.layers)
    assert len(seen) == 2 * depth
    return seen[:depth], [int(ids[0, 0]) for ids in seen[depth:]], said, kept


@pytest.mark.parametrize("method", SETTINGS)
def test_what_leaves_at_the_projector_is_renumbered_and_what_leaves_in_the_decoder_is_not(method):
    prompt, later, said, _ = numbered("llava", method, None)
    entered = prompt[0].shape[1]
    assert prompt[0].tolist() == [list(range(entered))]
    assert prompt[-1].shape[1] < entered
    assert prompt[-1][0, -1] == entered - 1
    assert (prompt[-1].diff() > 1).any()
    assert later == [entered] * len(later)
    assert said == "compact, original inside the decoder"


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_positions_that_are_asked_for_hold_at_both_places(method, positions):
    prompt, later, said, kept = numbered("llava", method, positions)
    assert said == positions
    if positions == "compact":
        assert all(ids.tolist() == [list(range(ids.shape[1]))] for ids in prompt)
        assert later == [ids.shape[1] for ids in prompt]
    else:
        assert (prompt[0].diff() > 1).any()
        assert prompt[-1][0].tolist() == kept.nonzero().flatten().tolist()
        assert later == [len(kept)] * len(later)


@pytest.mark.parametrize("method", SETTINGS)
def test_positions_that_are_rows_and_columns_of_an_image_are_never_renumbered(method):
    model = tiny("qwen2-vl")
    with tprune.prune(model, f"vlm/{method}", **SETTINGS[method]) as handle:
        assert handle.achieved().details["positions"] == "original"
