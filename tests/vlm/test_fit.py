"""Methods that learn in vision-language models: from questions to what is on disk."""

import json

import pytest
import torch

import tprune
from tests.fits import interrupted, same
from tests.test_cli import call
from tests.vlm.tiny import SMALL, speaking
from tprune import artifact
from tprune.core.budget import Site
from tprune.core.reduction import Reduction
from tprune.core.select import keep_where
from tprune.data import questions
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.fit import Fit, Plan, Relaxed
from tprune.models.source import Source
from tprune.models.subject import Subject
from tprune.models.vlm import anatomy
from tprune.pipelines.kernels import selection
from tprune.pipelines.run import pipeline
from tprune.pipelines.vlm_course import ANSWERS, VlmCourse
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe, Stage

LEARNERS = [fact.id for fact in registry.facts("vlm") if registry.load(fact.id, "vlm").learns != "no"]
REQUIRED = [name for name in LEARNERS if registry.load(name, "vlm").learns == "required"]
every_learner = pytest.mark.parametrize("method", LEARNERS)
STEPS = {"epochs": 3 * 2 / 2048, "batch": 2}


def settings(method):
    return STEPS | SMALL.get(method, {})


def driver(method, **more):
    stage = Stage("vlm", method, keep=0.5, set=settings(method), fit="built-in", **more)
    return pipeline(Recipe(ModelSource("a model in memory"), (stage,)), stage, Progress())


def subject():
    return Subject(*speaking(), Source("a model in memory", "memory", "", "transformers"))


def learned(method):
    model, processor = speaking()
    asked = {"keep": 0.5, "fit": "built-in", "tokenizer": processor}
    with tprune.prune(model, f"vlm/{method}", **asked, **settings(method)) as handle:
        return handle.tensors(True), handle, model


def course(asked="m3"):
    """Lessons on a tiny model, and the first of them."""
    one = subject()
    found = VlmCourse(
        driver(asked, positions="original"), one, anatomy(one.model), questions.training("built-in")
    )
    return found, next(iter(found.lessons(6, 0).read([0])))


@every_learner
def test_three_steps_change_what_is_stored_and_the_same_seed_gives_the_same_bytes(method):
    first, handle, model = learned(method)
    again, _, _ = learned(method)
    assert first
    assert same(first, again)
    assert handle.fitted["steps"] == 3
    assert handle.fitted["data"]["split"] == "train"
    assert not any(parameter.requires_grad for parameter in model.parameters())
    dense = dict(speaking()[0].named_parameters())
    assert same(dict(model.named_parameters()), dense) != handle.fitted["tuned"]
    if not handle.fitted["tuned"]:
        begun = driver(method)
        shape = begun.nominal(anatomy(speaking()[0]))
        assert not same(first, begun.method.neutral_state(shape, 0))


@every_learner
def test_an_interrupted_fit_goes_on_to_the_same_bytes(method, monkeypatch, tmp_path):
    whole, _, _ = learned(method)

    def run():
        with driver(method).apply(subject(), tmp_path) as handle:
            return handle.tensors(True)

    assert same(interrupted(run, tmp_path, monkeypatch), whole)


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """The tiny model with its processor on disk."""
    folder = tmp_path_factory.mktemp("models") / "speaker"
    for part in speaking():
        part.save_pretrained(folder)
    return folder


@every_learner
def test_a_fit_is_written_loaded_and_run_again_to_the_same_bytes(method, speaker, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    given = [part for name, value in settings(method).items() for part in ("--set", f"{name}={value}")]
    asked = ["vlm", "--method", method, "--keep", "0.5", "--fit", "built-in", *given, speaker]
    assert "fit on built-in data" in call(*asked, "--dry-run").output
    report = json.loads(call(*asked, "--limit", 4, "--out", out, "--json").stdout)
    assert report["fit"]["steps"] == 3
    files = sorted(file.name for file in out.glob("*.safetensors"))
    model, probe = tprune.load(out), artifact.read_tensors(out / artifact.PROBE)
    pixels, ids = probe["pixels"], probe["input"]
    with torch.no_grad():
        found = model(input_ids=ids, pixel_values=pixels, logits_to_keep=1).logits[:, -1]
    assert torch.allclose(found, probe["output"], atol=1e-4)
    call("run", out / "recipe.yaml", "--out", again, "--quiet")
    assert all((again / file).read_bytes() == (out / file).read_bytes() for file in files)


@pytest.mark.parametrize("method", REQUIRED)
def test_a_method_that_must_learn_says_so_in_one_line(method, speaker):
    with pytest.raises(UserError, match=f"{method} must be trained: add --fit"):
        call("vlm", "--method", method, "--keep", "0.5", speaker, "--dry-run")


def test_a_method_that_runs_unfitted_says_so_in_one_line(speaker):
    said = call("vlm", "--method", "m3", "--keep", "0.5", speaker, "--limit", 4, "--no-eval").stderr
    assert said.splitlines().count("m3 runs unfitted; --fit DATA fits it to this model") == 1


def test_what_must_learn_is_timed_before_it_has():
    built = registry.build("atp-llava", "vlm")
    with torch.no_grad():
        kept = selection(built.counted(), "cpu")()
    assert kept.count == kept.length - 576 + 64


def test_what_cannot_be_fitted_is_refused(tmp_path):
    model, processor = speaking()
    with pytest.raises(UserError, match="fastv learns nothing"):
        tprune.prune(model, "vlm/fastv", keep=0.5, fit="built-in", tokenizer=processor)
    with pytest.raises(UserError, match="a processor with a tokenizer"):
        tprune.prune(model, "vlm/m3", keep=0.5, fit="built-in")
    with pytest.raises(UserError, match="--fit .*: no such folder"):
        tprune.prune(model, "vlm/m3", keep=0.5, fit=str(tmp_path / "no"), tokenizer=processor)


def test_what_is_learned_from_is_read_before_anything_is_measured(speaker, tmp_path, monkeypatch):
    monkeypatch.setattr("tprune.pipelines.run.measure", lambda *given: pytest.fail("measured"))
    asked = ("vlm", "--method", "m3", "--keep", "0.5", "--fit", tmp_path / "no", speaker)
    with pytest.raises(UserError, match="--fit .*no: no such folder"):
        call(*asked)


def test_a_folder_of_questions_can_be_fitted_on(tmp_path):
    lines = []
    for place in range(4):
        image, (prompt, answer) = questions.training("built-in").sample(place)
        image.save(tmp_path / f"{place}.png")
        lines.append(json.dumps({"image": f"{place}.png", "prompt": prompt, "answer": answer}))
    (tmp_path / questions.FILE).write_text("\n".join(lines))
    model, processor = speaking()
    given = {"keep": 0.5, "fit": str(tmp_path), "tokenizer": processor, "epochs": 1.0, "batch": 2}
    with tprune.prune(model, "vlm/m3", **given) as handle:
        assert handle.fitted["steps"] == 2
        assert handle.fitted["data"]["samples"] == 4


def test_a_lesson_is_a_prompt_with_its_answer_and_its_end_whatever_their_lengths():
    found, (inputs, labels) = course()
    tokenizer = found.subject.processor.tokenizer
    asked = questions.training("built-in")
    places = found.lessons(6, 0).places(0)
    for place, ids, answers, real in zip(
        places, inputs["input_ids"], inputs[ANSWERS], inputs["attention_mask"].bool(), strict=True
    ):
        prompt, answer = asked.sample(place)[1]
        assert tokenizer.decode(ids[answers]) == f"{answer} <eos>"
        said = tokenizer.decode(ids[real & ~answers], skip_special_tokens=True)
        assert said == prompt
    assert torch.equal(inputs["input_ids"][inputs[ANSWERS]], labels)


class Halves(Fit):
    """Every second image token goes before layer 1, and again before layer 2."""

    epsilon = 0.0
    watches = (0, 3)

    def __init__(self, shape, relaxed):
        super().__init__(shape)
        self.sites, self.relaxed, self.seen = (Site(1), Site(2)), relaxed, []
        self.plan = Plan(1, 2, 1e-3)

    def at(self, site, view, memory):
        self.seen.append((view.text.sum(1), view.last.flatten()))
        stays = ~view.prunable | (view.position % 2**site.layer == 0)
        if self.relaxed:
            return Relaxed(view.hidden, stays.float())
        index, valid = keep_where(stays)
        return Reduction.keep(index, view.hidden.shape[1], valid)


def test_marked_tokens_leave_no_trace_and_what_is_to_be_said_is_not_seen():
    found, (inputs, _) = course()
    method, outputs, fits = driver("m3").method, [], [Halves(found.shape, one) for one in (True, False)]
    dense = found.outputs(inputs)
    for fit in fits:
        training = found.driver(method, fit, 0)
        outputs.append(found.outputs(inputs))
        with training.away():
            assert torch.allclose(found.outputs(inputs), dense, atol=1e-5)
        left = [stage.count for stage in training.memory["left"]]
        assert left == pytest.approx([0.5, 0.25], abs=0.04)
        assert training.memory["dense"].keys() == {0, 3}
        training.remove()
    assert torch.allclose(*outputs, atol=1e-5)
    assert not torch.allclose(outputs[0], dense, atol=1e-3)
    words = [
        len(questions.training("built-in").sample(place)[1][0].split())
        for place in found.lessons(6, 0).places(0)
    ]
    for text, last in fits[0].seen:
        assert text.tolist() == words
        ends = inputs[ANSWERS].int().argmax(1) - 1
        assert torch.equal(last, ends)
