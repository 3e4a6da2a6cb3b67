"""L3Prune: models that embed texts, and the triples that they tell apart."""

import json
from types import SimpleNamespace

import pytest
import torch

import tprune
from tests.decoders import decoder
from tests.encoders import NAMES as ENCODERS
from tests.encoders import encoder, tokenizer
from tests.golden_values import golden
from tprune.core.contrast import pooled
from tprune.data import triples
from tprune.errors import UserError
from tprune.methods import registry
from tprune.models.blocks import find_decoder
from tprune.models.calibrate import Stream
from tprune.models.embeddings import embed, embeddings, encode
from tprune.models.source import Source
from tprune.models.subject import Subject
from tprune.models.text_encoder import answers
from tprune.pipelines import embedder_weights
from tprune.pipelines.load import open_artifact
from tprune.pipelines.run import execute
from tprune.pipelines.structure import at_summaries
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe, Stage

NAMES = {"weighted_mean": "weighted_mean", "mean": "mean", "last": "last_token"}


def method(**settings):
    """The method with these hyperparameters."""
    return registry.build("l3prune", "llm-weights", settings)


def texts(rows):
    """Triples as a model with a tokenizer of letters wants them."""
    told = [row["instruction"] for row in rows] + [""] * (2 * len(rows))
    items = [row[key] for key in triples.KEYS for row in rows]
    return encode(SimpleNamespace(processor=tokenizer()), items, told, 64)


@pytest.mark.parametrize("pooling", NAMES)
def test_losses_behind_every_block_and_where_the_model_ends_are_the_authors(pooling):
    tensors, told = golden("llm-weights", "l3prune")
    found = find_decoder(decoder("llama", num_hidden_layers=6).model)
    stream, one, losses = (
        Stream(found, texts(told["inputs"]["triples"]), 4),
        method(pooling=pooling, batch=4),
        [],
    )
    for index in range(6):
        stream.advance(index)
        losses.append(one.contrast(embeddings(stream, one.pool)).item())
    assert losses == pytest.approx(tensors[NAMES[pooling]].tolist(), rel=1e-4)
    ends = [method(size=size).ends(losses) for size in ("small", "large")]
    assert ends == tensors["ends"][list(NAMES).index(pooling)].tolist()


def shallow(model, file):
    """The model ends where the loss is lowest in its shallower half."""
    return tprune.prune(
        model,
        "llm-weights/l3prune",
        tokenizer=tokenizer(),
        data=str(file),
        calibration=8,
        batch=4,
        size="small",
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The triples of the golden file twice, on disk."""
    path = tmp_path_factory.mktemp("triples") / "triples.json"
    path.write_text(json.dumps(golden("llm-weights", "l3prune")[1]["inputs"]["triples"] * 2))
    return path


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen2"])
def test_a_model_that_ends_early_embeds_texts_as_they_were_behind_that_block(name, file):
    layers = {"gpt2": "n_layer"}.get(name, "num_hidden_layers")
    model, one = decoder(name, **{layers: 4}), method(pooling="mean")
    given = texts(json.loads(file.read_text())[:4])
    stream = Stream(find_decoder(model), given, 4)
    handle = shallow(model, file)
    left = len(find_decoder(model).blocks)
    assert 1 <= left <= 2
    assert handle.achieved().value == pytest.approx(1 - left / 4)
    assert [row["loss"] > 0 for row in handle.per_layer()] == [True] * 4
    for index in range(left):
        stream.advance(index)
    assert torch.allclose(
        embed(find_decoder(model), given, one.pool), embeddings(stream, one.pool), rtol=1e-4, atol=1e-5
    )


def test_what_blocks_are_compared_by_is_the_last_token_of_every_text_however_short():
    given = texts(golden("llm-weights", "l3prune")[1]["inputs"]["triples"])
    stream = Stream(find_decoder(decoder()), given, 4)
    stream.advance(0)
    expected = [stream.hidden[place, length - 1] for place, length in enumerate(given.lengths)]
    assert len(set(given.lengths)) > 1
    assert torch.equal(at_summaries(stream), torch.stack(expected))


def test_methods_that_compare_foretold_tokens_do_not_go_with_one_that_embeds(file, tmp_path):
    decoder().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    stages = Stage("llm-weights", "sleb", sparsity=0.5), Stage("llm-weights", "l3prune")
    with pytest.raises(UserError, match="sleb compares what a model answers to sequences of one length"):
        execute(Recipe(ModelSource(str(tmp_path / "model")), stages, data=str(file)), Progress(quiet=True))


def test_a_share_of_the_blocks_goes_where_it_is_asked_for(file):
    model = decoder("llama", num_hidden_layers=6)
    handle = tprune.prune(
        model, "llm-weights/l3prune", tokenizer=tokenizer(), data=str(file), sparsity=0.5, size="small"
    )
    assert handle.achieved().value == 0.5
    assert handle.edits["removed"].tolist() == [3, 4, 5]


def test_embedders_are_measured_by_what_they_find_written_and_loaded_again(file, tmp_path):
    decoder("llama", num_hidden_layers=4).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    asked = Recipe(
        ModelSource(str(tmp_path / "model")), (Stage("llm-weights", "l3prune"),), data=str(file), batch_size=5
    )
    report = execute(asked, Progress(quiet=True), out=str(tmp_path / "out"))
    assert report["kind"] == "plain"
    assert {"accuracy", "agreement", "flops"} <= report["pruned"].keys()
    assert "perplexity" not in report["dense"]
    opened = open_artifact(str(tmp_path / "out"), Progress(quiet=True), None)
    opened.driver.prepare(opened.subject)
    again = opened.driver.evaluate(opened.subject).metrics
    assert again["accuracy"] == report["pruned"]["accuracy"]
    stage = Stage("llm-weights", "l3prune", recover="lora")
    with pytest.raises(UserError, match="--recover lora: it trains a model to foretell tokens, and l3prune"):
        execute(
            Recipe(ModelSource(str(tmp_path / "model")), (stage,), data=str(file)),
            Progress(quiet=True),
            out=str(tmp_path / "no"),
        )


def test_pooling_takes_the_tokens_that_count_and_no_others():
    hidden = torch.arange(12.0).view(2, 6, 1)
    begin, end = torch.tensor([1, 2]), torch.tensor([4, 2])
    assert pooled(hidden, begin, end, "mean").flatten().tolist() == [2.0, 0.0]
    assert pooled(hidden, begin, end, "last").flatten().tolist() == [3.0, 0.0]
    found = pooled(hidden, begin, end, "weighted_mean").flatten().tolist()
    assert found == pytest.approx([(1 + 2 * 2 + 3 * 3) / 6, 0.0])


def test_triples_of_any_text_are_thirds_of_passages_and_a_negative_is_no_other_s_query_or_positive(
    tmp_path,
):
    text = tmp_path / "text.json"
    text.write_text(json.dumps([" ".join(f"{place}x{word}" for word in range(40)) for place in range(8)]))
    found = triples.read(str(text), "calibration")
    queries, positives, negatives = zip(*found.items, strict=True)
    assert not set(queries) & set(positives)
    assert not set(negatives) & {*queries, *positives}
    other = triples.read(str(text), "evaluation")
    assert not {part for item in found.items for part in item} & {
        part for item in other.items for part in item
    }
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"query": "a", "positive": "b"}\n')
    with pytest.raises(
        UserError, match=r"--set general .*rows\.jsonl: expected `query`, `positive` and `negative`"
    ):
        triples.read(str(lines), "calibration", "--set general")
    lines.write_text('{"query": "a", "positive": "b", "negative": "c"}\n')
    with pytest.raises(UserError, match="1 triples to tell apart, and two are needed"):
        triples.read(str(lines), "calibration")


def test_what_cannot_be_embedded_is_refused_in_one_line(file):
    with pytest.raises(UserError, match="--length 300: this model has 256 positions; give at most that"):
        tprune.prune(decoder(), "llm-weights/l3prune", tokenizer=tokenizer(), data=str(file), length=300)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_losses_of_an_encoder_are_those_of_what_its_first_blocks_embed(name, file):
    model = encoder(name, False)
    subject = Subject(model, tokenizer(), Source("in memory", "memory", "", "transformers"))
    found = triples.read(str(file), "calibration")
    given = embedder_weights.drawn(Recipe(ModelSource("in memory"), (), calibration=8), subject, found)
    handle = shallow(model, file)
    expected = []
    inputs = {"input_ids": given.padded(), "attention_mask": given.real()}
    for left in (1, 2, 3):
        short = encoder(name, False)
        del find_decoder(short).blocks[left:]
        expected.append(method(batch=4).contrast(answers(short, inputs)).item())
    assert [row["loss"] for row in handle.per_layer()] == pytest.approx(expected, rel=1e-4)
    assert len(find_decoder(model).blocks) == method(size="small").ends(expected)
