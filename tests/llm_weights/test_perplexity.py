"""Perplexity with the head a part of the positions at a time."""

import pytest
import torch

from tests.decoders import decoder, tokens
from tests.llm_weights.tiny import NAMES
from tprune.evaluate import perplexity


@pytest.mark.parametrize("name", NAMES)
def test_the_head_in_parts_gives_the_losses_and_predictions_of_the_whole(name, monkeypatch):
    model, windows = decoder(name), tokens(3, 20)
    losses, predictions = perplexity.score_windows(model, windows, 2)
    with torch.no_grad():
        logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
    assert torch.allclose(losses, perplexity.token_losses(logits, windows[:, 1:]), atol=1e-4)
    assert torch.equal(predictions, logits.argmax(-1))
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 7 * logits.shape[-1])
    parts = perplexity.score_windows(model, windows, 2)
    assert torch.allclose(parts[0], losses, atol=1e-4)
    assert torch.equal(parts[1], predictions)


def test_the_logits_held_at_once_are_bounded_and_the_decoder_runs_once(monkeypatch):
    model, windows, widths, runs = decoder(), tokens(2, 20), [], []
    model.lm_head.register_forward_hook(lambda module, given, out: widths.append(out.shape[1]))
    model.model.layers[0].register_forward_hook(lambda module, given, out: runs.append(len(out)))
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 2 * 6 * model.config.vocab_size)
    perplexity.score_windows(model, windows, 2)
    assert widths == [6, 6, 6, 1]
    assert runs == [2]
    assert "forward" not in vars(model.model)


def test_no_more_tokens_than_allowed_go_through_the_model_together(monkeypatch):
    model, windows, rows = decoder(), tokens(5, 20), []
    model.model.layers[0].register_forward_hook(lambda module, given, out: rows.append(len(out)))
    monkeypatch.setattr(perplexity, "TOKENS_AT_ONCE", 45)
    perplexity.score_windows(model, windows, 4)
    assert rows == [2, 2, 1]
