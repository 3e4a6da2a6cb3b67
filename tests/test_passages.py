"""Passages and their classes, and what a text encoder is measured by."""

import pytest
import torch

from tests.encoders import encoder, tokenizer
from tprune.data import passages
from tprune.errors import UserError
from tprune.models.source import Source
from tprune.models.subject import Subject
from tprune.pipelines.run import agreement
from tprune.pipelines.text_task import TextTask
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe

NAMES = {name: place for place, name in enumerate(passages.TOPICS)}


def test_training_and_test_passages_are_pieces_of_the_same_topics_that_do_not_overlap():
    from pydoc_data.topics import topics

    for label, name in enumerate(passages.TOPICS):
        pieces = passages.cut(topics[name], label)
        words = topics[name].split()
        assert " ".join(pieces).split() == words[: len(" ".join(pieces).split())]
        assert all(passages.SHORTEST <= len(piece.split()) <= passages.LONGEST for piece in pieces[:-1])
        for split, first in (("train", 0), ("test", 1)):
            assert [text for text, of in passages.built_in(split) if of == label] == pieces[first::2]


def test_the_first_passages_are_from_every_topic():
    found = passages.read(None, 14, NAMES)
    assert found.labels == tuple(range(7)) * 2
    assert passages.read(None, 14, NAMES).protocol == found.protocol
    assert passages.training("built-in", NAMES).protocol["sha256"] != found.protocol["sha256"]


def test_the_built_in_passages_have_no_labels_for_a_model_that_tells_other_things_apart():
    assert passages.read(None, 7, {"good": 0, "bad": 1}).labels is None
    assert not passages.read(None, 7, {}).fits(0)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a.csv", "text,label\none two,types\nthree,0\n"),
        ("a.jsonl", '{"text": "one two", "label": "types"}\n{"text": "three", "label": 0}\n'),
        ("a.json", '[{"text": "one two", "label": "types"}, {"text": "three", "label": 0}]'),
    ],
)
def test_labels_are_numbers_or_the_model_s_own_names(tmp_path, file, content):
    (tmp_path / file).write_text(content)
    found = passages.read(str(tmp_path / file), None, NAMES)
    assert (found.items, found.labels) == (("one two", "three"), (NAMES["types"], 0))


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("a.csv", "text,label\none,cats\n", "label 'cats' is no class of this model; it has compound"),
        ("a.csv", "words,label\none,0\n", "expected `text`, a string, and `label` in every row"),
        ("a.jsonl", "{", "not readable as text"),
        ("a.jsonl", '{"text": 3, "label": 0}', "expected `text`, a string, and `label` in every row"),
        ("a.jsonl", '{"text": "one", "label": [1]}', "label '.1.' is no class of this model"),
        ("a.jsonl", '{"text": "one", "label": 1.7}', "label '1.7' is no class of this model"),
        ("a.json", "[]", "no passages in it"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, file, content, said):
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=said):
        passages.read(str(tmp_path / file), None, NAMES)


def test_plain_text_is_cut_into_passages_without_labels(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 900)
    found = passages.read(str(tmp_path / "a.txt"), None, NAMES)
    assert found.labels is None
    assert len(found) > 3


def task(head):
    model = encoder(head=head, num_labels=7)
    model.config.label2id = NAMES
    subject = Subject(model, tokenizer(), Source("tiny", "folder", "", "transformers"))
    recipe = Recipe(ModelSource("tiny"), (), limit=8, batch_size=3)
    return TextTask(recipe, subject, Progress(quiet=True)), subject


def test_a_classifier_is_measured_by_its_accuracy_whatever_the_batches():
    measured, subject = task(head=True)
    quality = measured.evaluate(subject)
    alone = [
        subject.model(**measured.batch(subject, [text])).logits.argmax().item()
        for text in measured.passages.items
    ]
    assert quality.predictions.tolist() == alone
    right = [one == label for one, label in zip(alone, measured.passages.labels, strict=True)]
    assert quality.metrics == {"accuracy": sum(right) / 8}
    assert quality.chance == 1 / 7


def test_embeddings_agree_by_their_cosine_with_the_dense_model_s():
    measured, subject = task(head=False)
    dense = measured.evaluate(subject)
    assert dense.predictions.shape == (8, 32)
    assert dense.metrics == {}
    torch.testing.assert_close(agreement(dense, dense), 1.0)
    subject.model.encoder.layer[0].output.dense.weight.zero_()
    other = measured.evaluate(subject)
    expected = torch.cosine_similarity(dense.predictions, other.predictions, dim=1).mean().item()
    assert agreement(other, dense) == pytest.approx(expected)
    assert expected < 0.999
