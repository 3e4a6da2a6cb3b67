"""What methods must agree on that the tests of all methods do not run, since they must be fitted."""

import torch
from transformers import DynamicCache

from tests.decoders import decoder, tokens


def padded_generate_its_rows_and_a_loop(prune, length):
    """A padded batch gives its rows' text, a loop of one's own as well, and beams run; -> the loop's cache.

    `prune` puts the method on a model; the prompt has `length` tokens, and five follow.
    """
    model, ids = decoder(), tokens(2, length)
    mask = torch.ones_like(ids)
    ids[1, :17], mask[1, :17] = 0, 0
    asked = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with prune(model):
        together = model.generate(ids, attention_mask=mask, **asked)[:, length:]
        for row in range(2):
            real = ids[row : row + 1, mask[row].bool()]
            alone = model.generate(real, **asked)[:, real.shape[1] :]
            assert torch.equal(alone, together[row : row + 1])
        cache, new, text = DynamicCache(), ids[:1], []
        for _ in range(5):
            new = model(new, past_key_values=cache).logits[:, -1:].argmax(-1)
            text.append(new)
        assert torch.equal(torch.cat(text, dim=1), together[:1])
        assert model.generate(ids[:1], num_beams=2, **asked).shape == (1, length + 5)
    return cache
