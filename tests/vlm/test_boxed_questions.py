"""Questions, and where their answers are read."""

import json

import pytest
import torch
from PIL import Image

from tests.vlm.test_fit import course
from tprune.data import questions
from tprune.errors import UserError


def test_the_boxes_of_a_question_hold_what_its_answer_is_read_from():
    asked = questions.training("built-in")
    for place in range(12):
        scene = asked.scene(place)
        assert asked.boxed(place, False)[1] == (scene.prompt, scene.answer, scene.boxes)
        assert asked.boxed(place, True)[1][2] == scene.digits
        if scene.kind == "count":
            assert len(scene.boxes) == int(scene.answer) == len(scene.digits)
        else:
            [box] = scene.boxes
            assert (box in scene.digits) == (scene.answer != "nothing")
        assert all(0 <= low < high <= 1 for box in scene.boxes for low, high in (box[::2], box[1::2]))


def test_boxes_of_whole_numbers_and_of_other_numbers_are_filled_up_alike():
    found, _ = course("glimpseprune")
    boxes = [((0, 0, 1, 1),), ((0, 0.5, 1, 1), (0, 0, 0.5, 0.5))]
    inputs, _ = found.collated([(Image.new("RGB", (8, 8)), ("what ?", "it", own)) for own in boxes])
    assert torch.equal(inputs["boxes"][0, 0], torch.tensor([0.0, 0, 1, 1]))
    assert inputs["boxes"][0, 1].isnan().all()
    assert torch.equal(inputs["boxes"][1], torch.tensor(boxes[1]))


def test_questions_without_boxes_are_refused_in_one_line(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    line = {"image": "a.png", "prompt": "what ?", "answer": "it"}
    (tmp_path / questions.FILE).write_text(json.dumps(line))
    with pytest.raises(UserError, match=r'--fit .*: this method learns from boxes: .*"boxes"'):
        questions.BoxedQuestions(questions.training(str(tmp_path)))
    for wrong in ([], [[0, 0, 1]], [[0, 0, 2, 1]], [[0.5, 0, 0.2, 1]], "all"):
        (tmp_path / questions.FILE).write_text(json.dumps(line | {"boxes": wrong}))
        with pytest.raises(UserError, match="the boxes of line 1"):
            questions.training(str(tmp_path))
    (tmp_path / questions.FILE).write_text(json.dumps(line | {"boxes": [[0, 0.5, 1, 1]]}))
    found = questions.BoxedQuestions(questions.training(str(tmp_path)))
    assert found.sample(0)[1] == ("what ?", "it", ((0, 0.5, 1, 1),))
