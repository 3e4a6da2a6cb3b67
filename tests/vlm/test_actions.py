"""A robot's policy: a LLaVA whose last words are bins of an action, and VLA-Pruner over an episode of it."""

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tprune
from tests.vlm.tiny import TEXT, TOWER
from tprune.models.prompts import noise_prompts

BINS, DIMENSIONS, STEPS = 24, 7, 5
WORDS = TEXT["vocab_size"]
LAYER, WATCHED, WINDOW, KEPT, DECAY = 1, 2, 2, 8, 0.8
"""Where tokens leave and whose attention is kept, of four layers: the paper's 3 and 15 of 32."""


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def policy():
    """As OpenVLA: the last entries of the vocabulary are the bins of every dimension of an action."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT),
        image_token_id=3,
        image_seq_length=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    return model


def episode(model):
    """One instruction, and what the camera shows at every control step."""
    frames = [noise_prompts(model, 1, seed) for seed in range(STEPS)]
    return [frame | {"input_ids": frames[0]["input_ids"]} for frame in frames]


def act(model, inputs):
    """The bins of one action, [7]."""
    bins = list(range(WORDS - BINS, WORDS))
    told = model.generate(
        **inputs,
        max_new_tokens=DIMENSIONS,
        do_sample=False,
        pad_token_id=0,
        prefix_allowed_tokens_fn=lambda row, told: bins,
    )
    return told[0, -DIMENSIONS:]


def looked(model, inputs, told, kept):
    """Logits at the last token and every layer's attention, over prompt and `told`; layers from K on see `kept`."""
    ids = torch.cat([inputs["input_ids"], told[None]], 1)
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    hooks = []
    for place, layer in enumerate(model.model.language_model.layers):
        seen = (
            causal
            if place < LAYER
            else causal & (kept_columns(kept, length) | torch.eye(length, dtype=torch.bool))
        )
        mask = torch.zeros(1, 1, length, length).masked_fill(~seen, -1e30)
        hooks.append(
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, mask=mask: (args, kwargs | {"attention_mask": mask}),
                with_kwargs=True,
            )
        )
    output = model(
        input_ids=ids, pixel_values=inputs["pixel_values"], output_attentions=True, use_cache=False
    )
    for hook in hooks:
        hook.remove()
    return output.logits[0, -1], [layer[0].mean(0) for layer in output.attentions]


def kept_columns(kept, length):
    """Which tokens are there, bool [length]."""
    there = torch.ones(length, dtype=torch.bool)
    there[: len(kept)] = kept
    return there


def chosen(score, acted, embeddings):
    """Eight of the sixteen tokens: the union of both levels' best, then always the one least like those there are."""
    union = sorted({*score.topk(KEPT).indices.tolist(), *acted.topk(KEPT).indices.tolist()})
    apart = {
        (i, j): 1 - cosine_similarity(embeddings[i], embeddings[j], dim=0).item()
        for i in union
        for j in union
    }
    picks = [max(union, key=lambda i: min(apart[i, j] for j in union if j != i))]
    while len(picks) < KEPT:
        free = [i for i in union if i not in picks]
        picks.append(max(free, key=lambda i: min(apart[i, j] for j in picks)))
    return sorted(picks)


def test_every_action_of_an_episode_is_that_of_a_policy_which_sees_what_the_paper_leaves():
    model = policy()
    frames = episode(model)
    image = frames[0]["input_ids"][0] == model.config.image_token_id
    asked = {"window": WINDOW, "reduction": 1 - KEPT / 16, "decay": DECAY}
    found, held = [], []
    with tprune.prune(model, "vlm/vla-pruner", **asked) as handle:
        for frame in frames:
            found.append(act(model, frame))
            owner = handle.driver.tally.owner
            held.append(None if owner is None else (owner[0][image] >= 0).nonzero().squeeze(1).tolist())
    assert all(((action >= WORDS - BINS) & (action < WORDS)).all() for action in found)
    assert len({tuple(action.tolist()) for action in found}) > 1

    model.set_attn_implementation("eager")
    history, places, alone = [], image.nonzero().squeeze(1), []
    for step, frame in enumerate(frames):
        kept = torch.ones_like(image)
        nothing = torch.zeros(0, dtype=torch.long)
        if len(history) >= WINDOW:
            _, maps = looked(model, frame, nothing, kept)
            score = maps[LAYER - 1].sum(0)[places]
            acted = sum(DECAY**age * paid for age, paid in enumerate(history[-WINDOW:]))
            embeddings = model.model.get_image_features(pixel_values=frame["pixel_values"]).pooler_output[0]
            picks = chosen(score, acted, embeddings)
            assert held[step] == picks
            alone.append(picks == sorted(score.topk(KEPT).indices.tolist()))
            kept[places] = False
            kept[places[picks]] = True
        else:
            assert held[step] is None
        told, paid = nothing, []
        for _ in range(DIMENSIONS):
            logits, maps = looked(model, frame, told, kept)
            paid.append(maps[WATCHED][-1, places] * kept[places])
            told = torch.cat([told, logits[WORDS - BINS :].argmax()[None] + WORDS - BINS])
        assert torch.equal(found[step], told)
        history.append(torch.stack(paid).mean(0))
    assert not all(alone)


def test_the_history_is_that_of_the_last_word_where_rows_are_padded_on_the_right():
    model = policy()
    image = model.config.image_token_id

    def kept(rows):
        with tprune.prune(model, "vlm/vla-pruner", window=1, reduction=1 - KEPT / 16) as handle:
            for inputs in rows:
                model(**inputs)
            owner = handle.driver.tally.owner
        return [(owner[row, ids == image] >= 0).tolist() for row, ids in enumerate(rows[-1]["input_ids"])]

    frames = [noise_prompts(model, 2, seed) for seed in range(2)]
    short = [{name: x[1:, :-2] if x.dim() == 2 else x[1:] for name, x in frame.items()} for frame in frames]
    for frame in frames:
        frame["input_ids"][1, -2:] = 0
        frame["attention_mask"][1, -2:] = 0
    assert kept(frames)[1] == kept(short)[0]
