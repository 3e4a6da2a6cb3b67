"""Tokens leave between the layers of transformers' Mamba, and what has attention and what has none are told apart."""

import json

import pytest
import torch
import transformers
from transformers import DynamicCache

import tprune
from tests.decoders import COMMON, VOCABULARY, count_hooks, decoder, tokens
from tests.llm_weights import tiny
from tprune.core.recurrence import Recurrence, shares_of_last
from tprune.core.scan import selective_scan
from tprune.data.passkey import Hidden
from tprune.errors import UserError
from tprune.evaluate.context import layer_bytes, score_continuations
from tprune.evaluate.passkey import retrieve
from tprune.evaluate.perplexity import token_losses
from tprune.models.recurrent import logits_behind
from tprune.pipelines.run import execute, pipeline
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe, Stage

PROMPT = 40
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 4}
TOKENS = {name: COMMON[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}


def mamba(kind="Mamba"):
    """A state-space model with weights from a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**SHAPE, **TOKENS)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


def prune(model, keep=0.5, **more):
    return tprune.prune(model, "simba", keep=keep, **more)


def left_padded():
    ids, gone = tokens(2, PROMPT), 13
    mask = torch.ones_like(ids)
    ids[1, :gone], mask[1, :gone] = 0, 0
    return ids, mask


def generated(model, ids, mask=None):
    return model.generate(ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False)


def given(length=9):
    """A recurrence of random numbers, two rows, three channels, four states."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.randn(*shape, generator=generator)

    wide, states = (2, 3, length), (2, 4, length)
    return Recurrence(some(*wide), some(*wide).exp(), -some(3, 4).exp(), some(*states), some(*states))


def test_the_share_of_a_token_is_what_the_last_output_loses_without_it():
    whole = given()
    shares, last = shares_of_last(whole), selective_scan(*whole)[..., -1]
    for token in range(whole.x.shape[-1]):
        x = whole.x.clone()
        x[..., token] = 0
        without = selective_scan(*whole._replace(x=x))[..., -1]
        assert torch.allclose(shares[..., token], last - without, atol=1e-5)


def states_of(mixer, entering):
    """x, Δ, A, B and C of a mixer, token by token, from the layer's normalised input [N, D]."""
    x = mixer.in_proj(entering).T.chunk(2)[0]
    width = mixer.conv1d.weight.shape[-1]
    padded = torch.nn.functional.pad(x, (width - 1, 0)).unfold(1, width, 1)  # [E, N, K]
    x = torch.nn.functional.silu((padded * mixer.conv1d.weight).sum(-1) + mixer.conv1d.bias[:, None])
    low, into, out = mixer.x_proj(x.T).split([mixer.time_step_rank, 4, 4], dim=-1)
    return x.T, torch.nn.functional.softplus(mixer.dt_proj(low)), -mixer.A_log.exp(), into, out


def impact(mixer, entering):
    """s(t) by the paper's recurrences: the state that token t alone leaves, carried to the end."""
    x, step, rate, into, out = states_of(mixer, entering)
    scores = []
    for token in range(len(x)):
        state = step[token, :, None] * into[token] * x[token, :, None]
        for later in range(token + 1, len(x)):
            state = (step[later, :, None] * rate).exp() * state
        scores.append((state @ out[-1]).max())
    return torch.stack(scores)


def test_the_prompt_passes_as_by_the_papers_formulas_token_by_token():
    model, ids = mamba(), tokens(1, PROMPT)
    hidden, left = model.backbone.embeddings(ids), torch.arange(PROMPT)
    for place, block in enumerate(model.backbone.layers):
        score = impact(block.mixer, block.norm(hidden)[0])
        hidden = block(hidden)
        if place < 3:
            count = round((PROMPT - 1) * (1 - 0.9 * (place + 1) / 3))
            kept = score[:-1].topk(count).indices.sort().values
            kept = torch.cat([kept, torch.tensor([len(score) - 1])])
            hidden, left = hidden[:, kept], left[kept]
    logits = model.lm_head(model.backbone.norm_f(hidden))
    with tprune.prune(model, "simba") as handle:
        found = model(ids).logits
        rows = [row["tokens"] for row in handle.per_layer()]
    assert torch.allclose(found[:, left], logits, atol=1e-5)
    assert rows == [39, 27, 16, 4]
    with tprune.prune(model, "simba", absolute=True):
        assert not torch.allclose(model(ids).logits, found, atol=1e-3)


def test_keeping_all_is_bitwise_the_dense_model():
    model, (ids, mask) = mamba(), left_padded()
    dense = model(ids).logits, model(ids, attention_mask=mask).logits, generated(model, ids, mask)
    hooks = count_hooks(model)
    with prune(model, 1.0):
        assert torch.equal(model(ids).logits, dense[0])
        assert torch.equal(model(ids, attention_mask=mask).logits, dense[1])
        assert torch.equal(generated(model, ids, mask), dense[2])
    with prune(model) as handle:
        assert not torch.allclose(model(ids).logits[:, -1], dense[0][:, -1], atol=1e-3)
        assert abs(handle.achieved().value - 0.5) < 0.02
    assert torch.equal(model(ids).logits, dense[0])
    assert count_hooks(model) == hooks


def test_a_left_padded_batch_equals_its_rows_in_generate_and_in_a_loop():
    model, (ids, mask) = mamba(), left_padded()
    with prune(model):
        logits = model(ids, attention_mask=mask).logits[:, -1]
        texts = generated(model, ids, mask)[:, PROMPT:]
        for row in range(2):
            one = ids[row : row + 1, mask[row].bool()]
            cache, new, text = DynamicCache(config=model.config), one, []
            for _ in range(5):
                found = logits_behind(model, cache, new)[:, -1]
                if not text:
                    assert torch.allclose(found[0], logits[row], atol=1e-5)
                new = found.argmax(-1, keepdim=True)
                text.append(new)
            assert torch.equal(torch.cat(text, dim=1)[0], texts[row])


def test_half_precision_runs_and_a_state_takes_the_bytes_it_took():
    model, ids = mamba().to(torch.bfloat16), tokens(2, PROMPT)
    dense = model(ids).cache_params
    with prune(model):
        cache = model(ids).cache_params
        assert model(ids[:, :1], cache_params=cache).logits.isfinite().all()
    assert layer_bytes(cache.layers) == layer_bytes(dense.layers) > 0


def test_what_follows_the_prompt_is_scored_as_in_one_pass():
    model, windows = mamba(), tokens(2, 32)
    losses, predictions, _ = score_continuations(model, windows, batch_size=2)
    logits = model(windows).logits[:, 23:-1]
    assert torch.allclose(losses, token_losses(logits, windows[:, 24:]), atol=1e-4)
    assert torch.equal(predictions, logits.argmax(-1))
    said = model(windows[:1]).logits[0].argmax(-1)
    right, wrong = said[28:29], (said[28:29] + 1) % VOCABULARY
    parts = windows[0, :24], windows[0, 24:29]
    assert retrieve(model, [Hidden(*parts, answer, 0) for answer in (right, wrong)]) == [True, False]


@pytest.mark.parametrize(
    ("call", "clue"),
    [
        (lambda m: prune(mamba("FalconMamba")), "FalconMambaMixer has another"),
        (lambda m: prune(mamba(), positions="compact"), "has no positions"),
        (lambda m: prune(decoder()), "no state-space model"),
        (
            lambda m: tprune.prune(m, "snapkv", keep=0.5),
            "without attention, where snapkv does not work; use simba",
        ),
        (lambda m: tprune.prune(m, "lazyllm", keep=0.5), "without attention, where lazyllm does not work"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_does(call, clue):
    model = mamba()
    hooks = count_hooks(model)
    with pytest.raises(UserError, match=clue):
        call(model)
    assert count_hooks(model) == hooks


def test_what_transformers_would_answer_wrongly_is_refused():
    model, ids = mamba(), tokens(2, PROMPT)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    with prune(model):
        with pytest.raises(UserError, match="pad on the left"):
            model(ids, attention_mask=mask)
        cache = model(ids).cache_params
        with pytest.raises(UserError, match="2 tokens at once"):
            model(ids[:, :2], cache_params=cache)


def test_a_recipe_is_run_saved_loaded_and_timed(tmp_path):
    mamba().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    stage = Stage("llm-context", "simba", keep=0.6)
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    more = {"data": str(tmp_path / "text.txt"), "length": 24, "limit": 1}
    asked = Recipe(ModelSource(str(tmp_path / "model")), (stage,), **more)
    report = execute(asked, Progress(), out=str(tmp_path / "out"), evaluate=False)
    assert abs(report["budget"]["achieved"] - 0.6) < 0.02
    loaded = tprune.load(str(tmp_path / "out"))
    with prune(mamba(), 0.6) as handle:
        expected = handle.driver.model(tokens(1, PROMPT)).logits
    assert torch.allclose(loaded(tokens(1, PROMPT)).logits, expected, atol=1e-6)
    driver = pipeline(asked, stage, Progress())
    subject = driver.load()
    driver.prepare(subject)
    assert driver.evaluate(subject).metrics["cache_mb"] > 0
    found = driver.bench(subject, rounds=1)
    assert found["prefill_speedup_flops"] > 1.3
    json.dumps(found)


def test_a_folder_without_tokenizer_files_is_said_to_lack_them(tmp_path):
    """transformers makes a tokenizer of nothing for it."""
    mamba().save_pretrained(tmp_path)
    stage = Stage("llm-context", "simba", keep=0.5)
    with pytest.raises(UserError, match="comes without a tokenizer; add its files"):
        execute(Recipe(ModelSource(str(tmp_path)), (stage,), length=24), Progress())
