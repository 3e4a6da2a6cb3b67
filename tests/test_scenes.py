"""The scenes of the built-in models: fixed by their seed, made of disjoint digits, and told truthfully."""

import numpy as np
import pytest

from tprune.data import scenes


@pytest.mark.parametrize(
    "make",
    [scenes.classification_scene, scenes.question_layout, scenes.mosaic_scene],
    ids=lambda f: f.__name__,
)
def test_a_scene_is_a_function_of_its_index_alone(make):
    first = make("train", 7, 3)
    make("train", 8, 3)
    again = make("train", 7, 3)
    pixels = (lambda made: made.pixels) if make is scenes.question_layout else (lambda made: made[0])
    assert np.array_equal(pixels(first), pixels(again))
    assert not np.array_equal(pixels(first), pixels(make("train", 7, 4)))
    assert not np.array_equal(pixels(first), pixels(make("test", 7, 3)))


def test_making_scenes_leaves_the_global_random_state_alone():
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    scenes.evaluation_scenes("digits-vit", 2)
    scenes.evaluation_scenes("digits-llava", 3)
    assert np.array_equal(before, np.random.get_state()[1])


def test_train_and_test_digits_share_no_scan():
    train, test = scenes.digit_images("train")[0], scenes.digit_images("test")[0]
    assert len(train) + len(test) == 1797
    assert not {scan.tobytes() for scan in train} & {scan.tobytes() for scan in test}


def test_scenes_are_rgb_images_of_the_documented_size():
    scene, question = (
        scenes.evaluation_scenes("digits-vit", 1)[0],
        scenes.evaluation_scenes("digits-llava", 1)[0],
    )
    for image in (scene.image, question.image):
        assert image.mode == "RGB"
        assert image.size == (scenes.SIZE, scenes.SIZE)


def test_answers_agree_with_the_layout():
    for index in range(40):
        layout = scenes.question_layout("test", index)
        asked = scenes.questions_about(layout, np.random.default_rng(index))
        for prompt, answer in asked["what"]:
            digit = layout.cells[scenes.PLACES.index(prompt.split()[3])]
            assert answer == (scenes.NOTHING if digit < 0 else str(digit))
        for prompt, answer in asked["where"]:
            (cell,) = np.flatnonzero(layout.cells == int(prompt.split()[2]))
            assert answer == scenes.PLACES[cell]
        assert asked["count"] == [("how many digits are there ?", str((layout.cells >= 0).sum()))]


def test_the_evaluation_set_asks_every_kind_and_its_first_scenes_do_not_depend_on_its_length():
    few, more = scenes.evaluation_scenes("digits-llava", 6), scenes.evaluation_scenes("digits-llava", 30)
    assert [(q.prompt, q.answer) for q in few] == [(q.prompt, q.answer) for q in more[:6]]
    assert {q.kind for q in more} == set(scenes.KINDS)


def test_every_digit_and_every_count_occurs_in_the_evaluation_sets():
    assert {scene.label for scene in scenes.evaluation_scenes("digits-vit", 100)} == set(range(10))
    counts = {q.answer for q in scenes.evaluation_scenes("digits-llava", 150) if q.kind == "count"}
    assert counts == {str(count) for count in scenes.COUNTS}


def test_an_unknown_set_or_split_is_named_in_the_error():
    with pytest.raises(ValueError, match="digits-bert"):
        scenes.evaluation_scenes("digits-bert")
    with pytest.raises(ValueError, match="validation"):
        scenes.question_layout("validation", 0)
