"""`--positions gap`: the position ids of the unpruned prompt, in ascending order, whatever order a method gives."""

import pytest
import torch

import tprune
from tests.vlm.tiny import IMAGE, tiny
from tprune.errors import UserError
from tprune.models.prompts import noise_prompts


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def entering(model, inputs, method, positions):
    """Position ids and embeddings that enter the decoder, and the logits behind the prompt."""
    seen = {}
    with tprune.prune(model, f"vlm/{method}", keep=0.5, positions=positions) as handle:
        core = handle.driver.core.layers[0]
        hook = core.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(
                kwargs, hidden=args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
        logits = model(**inputs).logits[:, -1]
        hook.remove()
        assert handle.achieved().details["positions"] == positions
    return seen["position_ids"], seen["hidden"], logits


@pytest.mark.parametrize("kind", ["llava", "llava-next"])
def test_contextual_tokens_go_back_to_the_places_of_their_anchors(kind):
    model = tiny(kind)
    inputs = noise_prompts(model, 2, 0)
    original, tokens, logits = entering(model, inputs, "visionzip", "original")
    gap, sorted_tokens, sorted_logits = entering(model, inputs, "visionzip", "gap")
    assert (original.diff() < 0).any()
    assert (gap.diff() > 0).all()
    order = original.argsort(dim=1)
    assert torch.equal(original.gather(1, order), gap)
    index = order.unsqueeze(2).expand(len(tokens), -1, tokens.shape[2])
    assert torch.equal(tokens.gather(1, index), sorted_tokens)
    assert not torch.allclose(logits, sorted_logits)


def test_a_method_that_keeps_the_order_runs_with_gap_as_with_original_and_text_behind_keeps_its_place():
    model = tiny("llava")
    inputs = noise_prompts(model, 2, 0)
    original, _, logits = entering(model, inputs, "fastervlm", "original")
    gap, _, same = entering(model, inputs, "fastervlm", "gap")
    assert torch.equal(logits, same)
    length = inputs["input_ids"].shape[1]
    behind = length - 1 - int((inputs["input_ids"][0] == IMAGE).nonzero().max())
    assert torch.equal(gap, original)
    assert gap[0, -behind:].tolist() == list(range(length - behind, length))


def test_gap_is_a_policy_for_images_alone():
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.vlm.tiny import TEXT

    with pytest.raises(UserError, match="--positions gap: expected original or compact"):
        tprune.prune(LlamaForCausalLM(LlamaConfig(**TEXT)), "llm-context/snapkv", keep=0.5, positions="gap")
