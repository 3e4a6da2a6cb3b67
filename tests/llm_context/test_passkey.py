"""Pass keys hidden in a text: where they are, and who finds them."""

import pytest
import torch

from tests.decoders import decoder
from tprune.data.passkey import DEPTHS, Hidden, hide
from tprune.data.text import Text
from tprune.errors import UserError
from tprune.evaluate.passkey import accuracy, retrieve


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, words, **more):
        return {"input_ids": [ord(letter) % 90 for letter in words]}


TEXT = Text(("a" * 2000,), {})


@pytest.mark.parametrize("inside", [False, True])
def test_every_prompt_is_as_long_as_asked_and_hides_its_key_at_its_depth(inside):
    prompts = hide(TEXT, Letters(), 200, 2 * DEPTHS, inside, seed=0)
    assert [prompt.depth for prompt in prompts] == [*range(DEPTHS), *range(DEPTHS)]
    assert all(len(prompt.context) + len(prompt.question) == 200 for prompt in prompts)
    assert all((len(prompt.question) == 0) == inside for prompt in prompts)
    letter = Letters()("a")["input_ids"][0]
    hay = [int((prompt.context[:5] == letter).sum()) == 5 for prompt in prompts]
    assert hay == [prompt.depth > 0 for prompt in prompts]
    assert len({tuple(prompt.answer.tolist()) for prompt in prompts}) == 2 * DEPTHS


def test_keys_depend_on_the_seed_alone():
    one, same, other = (hide(TEXT, Letters(), 200, 3, False, seed=seed)[2] for seed in (0, 0, 1))
    assert torch.equal(one.context, same.context)
    assert not torch.equal(one.answer, other.answer)


def test_a_length_without_room_for_text_is_refused():
    with pytest.raises(UserError, match="--length 100"):
        hide(TEXT, Letters(), 100, 1, False, seed=0)


@pytest.mark.parametrize("asked", [0, 4])
def test_a_key_is_found_exactly_where_greedy_decoding_gives_it(asked):
    model = decoder()
    ids = torch.randint(0, 50, (24,), generator=torch.Generator().manual_seed(4))
    context, question = ids[: 24 - asked], ids[24 - asked :]
    text = ids
    for _ in range(3):
        text = torch.cat([text, model(text[None]).logits[0, -1:].argmax(-1)])
    said = text[24:]
    wrong = said.clone()
    wrong[1] += 1
    prompts = [Hidden(context, question, answer, depth) for depth, answer in ((0, said), (3, wrong))]
    found = retrieve(model, prompts)
    assert found == [True, False]
    assert accuracy(prompts, found) == {
        "accuracy": 0.5,
        "accuracy_by_kind": {"depth 0%": 1.0, "depth 27%": 0.0},
    }
