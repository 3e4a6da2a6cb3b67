"""Masks that are learned with the weights, against the authors' code (the golden files) and from the command line."""

import json

import pytest
import torch
from torch import nn

import tprune
from tests import encoders
from tests.decoders import decoder, tokens
from tests.fits import StoppedError, stopping
from tests.golden_values import golden
from tests.llm_weights.test_command import SMALL, run
from tests.llm_weights.tiny import logits, prune
from tprune import artifact
from tprune.core.relax import masked_weight
from tprune.core.schedule import cubic_rise
from tprune.errors import UserError
from tprune.methods import registry
from tprune.models.blocks import find_decoder
from tprune.models.matrix import Matrix
from tprune.models.scored import scored
from tprune.models.source import Source
from tprune.models.subject import Subject
from tprune.pipelines.learned_masks import Masking
from tprune.pipelines.run import pipeline
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe, Stage

GOLDEN = {method: golden("llm-weights", method) for method in ("movement", "soft-movement")}
CASES = [(method, name) for method, (_, told) in GOLDEN.items() for name in told["settings"]["cases"]]
FEW = {"epochs": 0.5, "batch": 4, "lr": 1e-3}


def built(method, case, warmup):
    """The method of a golden case, and the sparsity that it is given."""
    given = {"warmup": warmup, "lr": case["lr"], "score_lr": case["score_lr"]}
    if method == "movement":
        return registry.build(method, "llm-weights", given), 1 - case["final"]
    given |= {"threshold": case["final"], "penalize": case["lam"]}
    return registry.build(method, "llm-weights", given), None


@pytest.mark.parametrize(("method", "name"), CASES)
def test_masks_gradients_scores_and_weights_are_the_authors(method, name):
    tensors, settings = GOLDEN[method][0], GOLDEN[method][1]["settings"]
    steps = settings["steps"]
    method, sparsity = built(method, settings["cases"][name], settings["warmup_steps"] / steps)
    net = nn.ModuleDict({"first": nn.Linear(8, 12), "second": nn.Linear(12, 6)})
    net.load_state_dict({key: tensors[key] for key in net.state_dict()})
    matrices = [Matrix(key, 0, layer.weight, f"{key}.weight", key) for key, layer in net.items()]
    with scored(net, matrices) as scores:
        fit = Masking(method, scores, sparsity)
        groups = [{"lr": method.lr, "weight_decay": 0.0} | group for group in fit.groups(net)]
        optimizer = torch.optim.AdamW(groups)
        for step in range(steps):
            assert [(~mask).sum() for mask in scores.masks()] == tensors[f"{name}/kept"][step].tolist()
            outputs = net["second"](net["first"](tensors["x"][step]).tanh())
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(outputs, tensors["y"][step])
            sum(fit.penalty().values(), loss).backward()
            nn.utils.clip_grad_norm_(net.parameters(), method.clip)
            for key, layer in net.items() if f"{name}/gradient{step}/first.weight" in tensors else ():
                expected = {
                    end: tensors[f"{name}/gradient{step}/{key}.{end}"]
                    for end in ("weight", "bias", "mask_scores")
                }
                held = layer.parametrizations.weight
                assert torch.allclose(held.original.grad, expected["weight"], rtol=1e-4, atol=1e-6)
                assert torch.allclose(held[0].score.grad, expected["mask_scores"], rtol=1e-4, atol=1e-6)
                assert torch.allclose(layer.bias.grad, expected["bias"], rtol=1e-4, atol=1e-6)
            optimizer.step()
            fit.settle((step + 1) / steps)
        for key, score, mask in zip(net, scores.values(), scores.masks(), strict=True):
            assert torch.equal(~mask, tensors[f"{name}/{key}.mask"])
            assert torch.allclose(score, tensors[f"{name}/{key}.score"], rtol=1e-4, atol=1e-5)
    for key, value in net.state_dict().items():
        assert torch.allclose(value, tensors[f"{name}/{key}"], rtol=1e-4, atol=1e-5)


def test_a_masked_weight_is_exact_and_every_score_gets_gradient_times_weight():
    weight, score, upstream = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(2))
    weight.requires_grad_(), score.requires_grad_()
    kept = weight.detach() > 0
    found = masked_weight(weight, score, kept)
    found.backward(upstream)
    assert torch.equal(found.detach(), weight.detach().where(kept, 0.0))
    assert torch.equal(weight.grad, upstream.where(kept, 0.0))
    assert torch.allclose(score.grad, upstream * weight.detach())


def test_the_cubic_stands_still_before_and_after_and_is_seven_eighths_half_way():
    assert [cubic_rise(done, 0.2, 0.8) for done in (0.0, 0.2, 0.8, 1.0)] == [0, 0, 1, 1]
    assert cubic_rise(0.5, 0.2, 0.8) == pytest.approx(7 / 8)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "mixtral"])
@pytest.mark.parametrize("method", ["movement", "soft-movement"])
def test_counts_are_exact_and_the_loss_falls_in_every_kind_of_decoder(method, name, text):
    model = decoder(name)
    kinds = [type(module) for module in model.modules()]
    handle = prune(model, method, text, sparsity=0.5, fit=str(text), **FEW)
    first, last = handle.fitted["losses"]["next token"]
    assert last < first
    assert handle.achieved().value == 0.5
    shares = [row["sparsity"] for row in handle.per_layer()]
    assert (max(shares) > min(shares)) == (method == "soft-movement")
    assert [type(module) for module in model.modules()] == kinds
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_embeddings_stand_still_and_norms_learn(text):
    model, other = decoder(), decoder()
    prune(model, "movement", text, sparsity=0.5, fit=str(text), **FEW)
    assert torch.equal(model.model.embed_tokens.weight, other.model.embed_tokens.weight)
    assert not torch.equal(model.model.norm.weight, other.model.norm.weight)


def test_without_a_sparsity_the_threshold_decides_and_some_of_every_matrix_stays(text):
    model = decoder()
    handle = prune(model, "soft-movement", text, fit=str(text), threshold=1.0, **FEW)
    matrices = [part.weight for part in model.model.layers.modules() if isinstance(part, nn.Linear)]
    left = [int((weight != 0).sum()) for weight in matrices]
    assert left == [int(0.005 * weight.numel()) + 1 for weight in matrices]
    assert handle.achieved().value == 1 - sum(left) / sum(weight.numel() for weight in matrices)


def test_some_of_every_matrix_stays_whatever_the_sparsity():
    scores = [torch.randn(20, 30, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    gone = registry.build("soft-movement", "llm-weights", {}).removed(scores, 1.0, 0.999)
    for score, mask in zip(scores, gone, strict=True):
        assert (~mask).sum() == 4
        assert score[~mask].min() > score[mask].max()


def asked(folder, text, out, *more):
    small = "--set epochs=0.3 --set batch=4 --set lr=1e-3"
    return [
        *f"--method movement --sparsity 0.5 --fit {text} {small} {folder} --data {text}".split(),
        *f"--out {out} --json".split(),
        *SMALL,
        *more,
    ]


@pytest.mark.parametrize("how", [[], ["--by-reference"]])
def test_what_is_written_is_what_was_trained(how, folder, text, tmp_path):
    out = tmp_path / "out"
    report = json.loads(run(*asked(folder, text, out, *how)).stdout)
    assert report["fit"]["steps"] > 0
    probe = artifact.read_tensors(out / "probe.safetensors")
    again = tprune.load(str(out))
    assert torch.equal(logits(again, probe["input"])[:, -2:], probe["output"])


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(folder, text, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(*asked(folder, text, whole))
    stopping(5, monkeypatch)
    with pytest.raises(StoppedError):
        run(*asked(folder, text, broken))
    run(*asked(folder, text, broken))
    files = [folder / "model.safetensors" for folder in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("movement", {"sparsity": 0.5}, "must be trained: add --fit"),
        ("movement", {"pattern": "2:4", "fit": "built-in"}, "knows no patterns"),
        ("movement", {"fit": "built-in"}, "needs a budget"),
        ("movement", {"sparsity": 0.5, "fit": "built-in", "warmup": 0.4}, "no steps are left"),
        ("soft-movement", {"sparsity": 0.5, "fit": "built-in", "allocate": "erk"}, "shares its budget out"),
        ("wanda", {"sparsity": 0.5, "fit": "built-in"}, "learns nothing"),
    ],
)
def test_what_does_not_go_is_refused_in_one_line(method, options, says, text):
    with pytest.raises(UserError, match=says):
        prune(decoder(), method, text, **options)


def test_outputs_are_the_masked_model_s_once_the_scores_are_gone(text):
    model, ids = decoder(), tokens(2, 9)
    matrix = find_decoder(model).matrices(0)[0]
    with scored(model, [matrix]) as scores:
        gone = [torch.arange(matrix.parameter.numel()).view(matrix.shape) % 3 == 0]
        scores.mask(gone)
        masked = logits(model, ids)
    matrix.remove(gone[0])
    assert torch.equal(logits(model, ids), masked)


def test_low_precision_is_refused_before_anything_is_loaded(folder, text, tmp_path):
    with pytest.raises(UserError, match="give --dtype float32"):
        run(*asked(folder, text, tmp_path / "out", "--dtype", "bfloat16"))


def classifying(tmp_path, model):
    """The driver and the subject of a run on an encoder, and a file of passages with their classes."""
    data = tmp_path / "passages.json"
    rows = [
        {"text": "ab" * (place % 5 + 3) + "cdefg"[place % 5] * 9, "label": place % 5} for place in range(60)
    ]
    data.write_text(json.dumps(rows))
    stage = Stage("llm-weights", "movement", sparsity=0.5, fit=str(data), set=FEW | {"epochs": 4.0})
    recipe = Recipe(ModelSource("tiny"), (stage,), data=str(data))
    subject = Subject(model, encoders.tokenizer(), Source("tiny", "folder", "", "transformers"))
    return pipeline(recipe, stage, Progress(quiet=True)), subject


def test_an_encoder_learns_from_classes_of_passages(tmp_path):
    driver, subject = classifying(tmp_path, encoders.encoder())
    driver.prepare(subject)
    handle = driver.apply(subject, None)
    first, last = handle.fitted["losses"]["classes"]
    assert last < first
    assert handle.achieved().value == 0.5


def test_an_encoder_without_a_classifier_is_refused(tmp_path):
    driver, subject = classifying(tmp_path, encoders.encoder(head=False))
    with pytest.raises(UserError, match="learns from classes"):
        driver.apply(subject, None)
