"""The command line through Click's runner, and once through a real shell."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tprune import zoo
from tprune.cli import COMMANDS, command, said
from tprune.commands.common import FAMILY_DEFAULTS
from tprune.errors import UserError
from tprune.methods import registry
from tprune.models import load as loaders
from tprune.recipe import UNREAD


def call(*words):
    """Run tprune in this process; a UserError is raised, as `main` would turn it into a line and exit code 2."""
    result = CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)
    return result


def prune(folder, *words):
    return call("vit", "--method", "tome", "--keep", "0.6", folder, "--limit", 8, "--batch-size", 4, *words)


def test_help_names_every_command():
    text = call("--help").output
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help(name):
    assert "Usage" in call(name, "--help").output


@pytest.mark.parametrize("words", [["--help"], ["methods"], ["methods", "vit", "tome"]])
def test_listing_does_not_import_torch(words):
    program = (
        "import sys; from tprune.cli import command; command(standalone_mode=False, args=sys.argv[1:]); "
        "assert not {'torch', 'timm', 'transformers', 'rich'} & set(sys.modules), 'imported too much'"
    )
    subprocess.run([sys.executable, "-c", program, *words], check=True, capture_output=True)


def test_importing_tprune_does_not_import_torch():
    program = "import sys, tprune; tprune.Recipe; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_methods_lists_every_method_file():
    text = call("methods").output
    for fact in registry.facts():
        assert any(line.split()[:2] == [fact.family, fact.id] for line in text.splitlines())


def test_methods_tells_all_about_one():
    text = call("methods", "vit", "tome").output
    for word in ("2210.09461", "facebookresearch/ToMe", "prop_attn", "golden values"):
        assert word in text


def test_json_is_one_object_with_the_promised_keys(vit_folder):
    result = prune(vit_folder, "--json")
    report = json.loads(result.stdout)
    promised = [
        "family",
        "method",
        "model",
        "params",
        "seed",
        "budget",
        "dense",
        "pruned",
        "per_layer",
        "out",
    ]
    assert set(promised) <= set(report)
    assert {"asked", "achieved"} <= set(report["budget"])
    assert set(report["dense"]) == set(report["pruned"])
    figures = {"accuracy", "agreement", "flops", "latency_ms", "throughput", "peak_memory_mb"}
    assert figures <= set(report["dense"])
    assert report["pruned"]["flops"] < report["dense"]["flops"]
    assert report["dense"]["agreement"] == 1.0


def test_the_table_shows_dense_beside_pruned(vit_folder):
    text = prune(vit_folder).stdout
    assert "asked 0.6, achieved 0." in text
    assert "agreement with dense" in text
    assert "FLOPs" in text
    assert "tokens attention" in text


def test_without_a_model_the_built_in_one_is_named(monkeypatch):
    from tprune.commands import common

    seen = {}
    monkeypatch.setattr(common, "launch", lambda recipe, **output: seen.update(recipe=recipe))
    result = call("vit", "--method", "tome", "--keep", "0.6")
    assert "using the built-in digits-vit" in result.stderr
    assert seen["recipe"].model.name == "digits-vit"


ASKED = {
    "bench": ("--method", "random", "--keep", "0.5"),
    "sweep": ("--method", "random", "--keep", "0.5", "--out", "nowhere"),
    "tune": ("--method", "random", "--keep", "0.5", "--set", "seed=0:1"),
    "search": ("--target-flops", "0.5"),
    "eval": (),
}
"""What the commands of all families are asked."""


@pytest.mark.parametrize("name", list(ASKED))
@pytest.mark.parametrize(
    ("family", "option"), [(family, option) for family, unread in UNREAD.items() for option in unread]
)
def test_what_says_nothing_to_a_family_is_refused_before_a_model_is_loaded(name, family, option, monkeypatch):
    monkeypatch.setattr(loaders, "load", None)
    where = [FAMILY_DEFAULTS[family], "--family", family] if name == "eval" else [family]
    with pytest.raises(UserError, match=rf"^--{option} 4: .* in {family}; leave it out$"):
        call(name, *where, *ASKED[name], f"--{option}", 4)


def test_eval_of_a_folder_asks_the_family_that_it_was_written_by(vit_folder, tmp_path):
    prune(vit_folder, "--out", tmp_path / "out", "--no-eval", "--quiet")
    with pytest.raises(UserError, match="--length 4: images have their own number of tokens in vit"):
        call("eval", tmp_path / "out", "--length", 4)


@pytest.mark.parametrize(
    "words",
    [("--family", "vlm"), ("--revision", "main"), ("--weights", "a.safetensors"), ("--random-weights",)],
)
def test_eval_of_a_folder_refuses_what_says_which_model(vit_folder, tmp_path, words):
    prune(vit_folder, "--out", tmp_path / "out", "--no-eval", "--quiet")
    with pytest.raises(
        UserError, match=rf"^{words[0]}.*: .* is an output folder, which says it itself; leave it out$"
    ):
        call("eval", tmp_path / "out", *words)


def test_out_eval_show_and_run_round_trip(vit_folder, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    report = json.loads(prune(vit_folder, "--out", out, "--json").stdout)
    assert report["kind"] == "wrapped"
    assert not list(tmp_path.glob(".*"))
    shown = json.loads(call("show", out, "--json").stdout)
    assert shown["pruned"]["accuracy"] == report["pruned"]["accuracy"]
    measured = json.loads(call("eval", out, "--json").stdout)["measured"]
    assert measured["accuracy"] == report["pruned"]["accuracy"]
    assert measured["flops"] == report["pruned"]["flops"]
    call("run", out / "recipe.yaml", "--out", again, "--quiet")
    for file in out.glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()


def test_by_reference_stores_no_base_weights_and_checks_them(vit_folder, tmp_path):
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    import tprune

    copy, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(vit_folder, copy)
    prune(copy, "--out", out, "--by-reference", "--quiet")
    assert not (out / "model.safetensors").exists()
    probe = load_file(out / "probe.safetensors")
    assert torch.allclose(tprune.load(out)(probe["input"]), probe["output"], atol=1e-6)
    weights = load_file(copy / "model.safetensors")
    weights["head.bias"] += 1
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(UserError, match="are not those this artifact was made from"):
        tprune.load(out)


def test_a_wrapped_artifact_opens_in_a_fresh_process(vit_folder, tmp_path):
    out = tmp_path / "out"
    prune(vit_folder, "--out", out, "--quiet")
    program = (
        "import sys, torch, tprune; from safetensors.torch import load_file; "
        "probe = load_file(sys.argv[1] + '/probe.safetensors'); "
        "assert torch.allclose(tprune.load(sys.argv[1])(probe['input']), probe['output'], atol=1e-5)"
    )
    subprocess.run([sys.executable, "-c", program, str(out)], check=True)


def test_dry_run_writes_and_loads_nothing(vit_folder, tmp_path):
    result = prune(vit_folder, "--out", tmp_path / "out", "--dry-run")
    assert "would prune" in result.output
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_one_line_and_exit_code_2_in_a_real_shell(tmp_path):
    tprune = Path(sys.executable).with_name("tprune")
    for words, clue in (
        ("vit --method nonsense --keep 0.5", "no method 'nonsense'"),
        ("vit --method tome --keep 1.5 --dry-run", "--keep 1.5"),
        ("vit --keep 0.5", "missing option '--method'; see tprune vit --help"),
    ):
        result = subprocess.run(f"{tprune} {words}", shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 2
        mistakes = [line for line in result.stderr.splitlines() if not line.startswith("no model given")]
        assert len(mistakes) == 1
        assert mistakes[0].startswith("error: ")
        assert clue in mistakes[0]
        assert result.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "clue"),
    [
        (["vit", "--method", "tome", "--keep", "half"], "'half' is not a valid float; see tprune vit --help"),
        (
            ["vit", "--method", "tome", "--keep"],
            "option '--keep' requires an argument; see tprune vit --help",
        ),
        (["zoo", "train", "--out"], "option '--out' requires an argument; see tprune zoo train --help"),
        (["prune"], "no such command 'prune'; see tprune --help"),
        (["tune"], "Choose from: vit, vlm, llm-context, llm-weights; see tprune tune --help"),
    ],
)
def test_what_click_finds_wrong_is_one_line(words, clue):
    with pytest.raises(click.ClickException) as mistake:
        command(words, prog_name="tprune", standalone_mode=False)
    line = said(mistake.value, words)
    assert line.startswith("error: ")
    assert line.endswith(clue)
    assert "\n" not in line


@pytest.mark.parametrize(
    ("family", "name"), [("vit", "length"), ("vlm", "length"), ("llm-context", "calibration")]
)
def test_a_family_takes_no_option_that_says_nothing_to_it(family, name):
    def names(family):
        return {option.name for option in command.get_command(click.Context(command), family).params}

    assert name not in names(family)
    assert name in names("llm-weights")


BAD = {
    "an unknown model": (["--model", "nonsense-model"], "no model 'nonsense-model'"),
    "no such folder": (["--model", "./nowhere/at/all"], "no model folder"),
    "keep zero": (["--keep", "0"], "--keep 0: expected a fraction above 0"),
    "keep above one": (["--keep", "1.5"], "--keep 1.5"),
    "an unknown hyperparameter": (["--set", "x=1"], "no hyperparameter 'x'; it has: r, inflect, prop_attn"),
    "a hyperparameter of the wrong type": (["--set", "prop_attn=maybe"], "expected true or false"),
    "a hyperparameter out of bounds": (["--set", "inflect=3"], "expected -1 to 1"),
    "a malformed setting": (["--set", "r"], "expected NAME=VALUE"),
    "two budgets": (["--set", "r=3"], "both budgets"),
    "a missing data folder": (["--data", "nowhere"], "no such folder"),
    "no such device": (["--device", "cuda:7"], "no such device; there is cpu"),
    "a device that computes nothing": (["--device", "meta"], "no such device; there is cpu"),
    "an unknown precision": (["--dtype", "float12"], "expected float32"),
    "a missing weights file": (["--weights", "nowhere.safetensors"], "no such file"),
    "weights of another model": (
        ["--weights", str(zoo.path("digits-vit") / "model.safetensors")],
        "does not fit",
    ),
    "positions of a vit": (["--positions", "compact"], "keep their positions"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case, vit_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, clue = list(BAD[case][0]), BAD[case][1]
    model = vit_folder
    if "--model" in words:
        model = words.pop()
        words.remove("--model")
    budget = [] if "--keep" in words else ["--keep", "0.6"]
    with pytest.raises(UserError) as error:
        call("vit", "--method", "tome", *budget, *words, model, "--limit", 4, "--out", "out", "--quiet")
    assert clue in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_empty_and_an_unreadable_data_folder_are_refused(vit_folder, tmp_path):
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "a.png").write_text("no image")
    with pytest.raises(UserError, match="no images"):
        prune(vit_folder, "--data", empty)
    with pytest.raises(UserError, match="not a readable image"):
        prune(vit_folder, "--data", broken)


def test_an_existing_output_folder_is_kept_unless_forced(vit_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    with pytest.raises(UserError, match="exists; give another folder, or --force"):
        prune(vit_folder, "--out", out)
    assert (out / "precious").read_text() == "kept"
    prune(vit_folder, "--out", out, "--force", "--quiet")
    assert not (out / "precious").exists()
    assert (out / "report.json").exists()


def test_the_aliases_name_models_that_timm_knows():
    from tprune.models.load import in_timm
    from tprune.models.source import ALIASES

    assert {"deit_t", "deit_s", "deit_b", "vit_s", "vit_b", "vit_l"} <= set(ALIASES)
    assert all(in_timm(name) for alias, name in ALIASES.items() if not alias.startswith("vim"))


def test_weights_of_a_file_take_the_place_of_the_model_s_own(vit_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    import tprune

    weights = load_file(vit_folder / "model.safetensors")
    weights["head.bias"] += 1
    save_file(weights, tmp_path / "other.safetensors")
    prune(vit_folder, "--weights", tmp_path / "other.safetensors", "--out", tmp_path / "out", "--quiet")
    assert tprune.load(tmp_path / "out").head.bias.equal(weights["head.bias"])


def test_a_corrupt_model_is_refused(vit_folder, tmp_path):
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(vit_folder, copy)
    (copy / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(UserError, match="model are not readable safetensors .*; get or save the model again"):
        prune(copy)


def test_a_full_disk_leaves_nothing(vit_folder, tmp_path, monkeypatch):
    import errno

    from tprune.models import save

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save, "model", full)
    with pytest.raises(UserError, match="the disk is full"):
        prune(vit_folder, "--out", tmp_path / "out", "--quiet")
    assert not list(tmp_path.iterdir())


def test_an_artifact_that_does_not_reproduce_its_outputs_is_not_kept(vit_folder, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    from tprune.models import save

    write = save.model

    def damaged(subject, folder):
        write(subject, folder)
        weights = load_file(folder / "model.safetensors")
        weights["head.bias"] = weights["head.bias"] + 1
        save_file(weights, folder / "model.safetensors")

    monkeypatch.setattr(save, "model", damaged)
    with pytest.raises(RuntimeError, match="does not reproduce"):
        prune(vit_folder, "--out", tmp_path / "out", "--quiet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "method", "own", "clue"),
    [
        ("llm-context", "snapkv", "vision", "tprune llm-context does not prune; use tprune vit"),
        ("vlm", "fastv", "vision", "tprune vlm does not prune; use tprune vit"),
        ("vlm", "fastv", "text", "which tprune vlm does not prune"),
        ("vit", "tome", "text", "tprune vit prunes ViT"),
    ],
)
def test_a_model_of_another_family_is_refused_by_name(family, method, own, clue, vit_folder, folder):
    model = vit_folder if own == "vision" else folder
    with pytest.raises(UserError, match=clue):
        call(family, "--method", method, "--keep", "0.5", model, "--no-eval", "--quiet")


def test_a_vision_model_in_memory_has_no_cache(vit):
    import tprune

    with pytest.raises(UserError, match="no language model of transformers"):
        tprune.prune(vit, "snapkv", keep=0.5)


def test_an_unreachable_hub_is_said_in_one_line():
    with pytest.raises(UserError, match="the hub cannot be reached for deit_s; go on with --weights"):
        call("vit", "--method", "tome", "--keep", "0.6", "deit_s", "--quiet")


def test_bench_prints_the_ratio_of_measured_to_theoretical_speedup(vit_folder, monkeypatch):
    from tprune.cli import THREADING

    for name, value in THREADING.items():
        monkeypatch.setenv(name, value)
    words = ["bench", "vit", vit_folder, "--method", "tome", "--keep", "0.6", "--rounds", "2", "--json"]
    result = json.loads(call(*words).stdout)["results"][0]
    assert result["speedup_ratio"] == pytest.approx(result["speedup_measured"] / result["speedup_flops"])
    assert result["threading"] == THREADING
    within = result["within_rounds"]["speedup_ratio"]
    assert within["min"] <= within["q1"] <= within["median"] <= within["q3"]


def test_a_ratio_within_rounds_is_not_moved_by_a_machine_that_slows_down():
    from tprune.commands.bench import quartiles, ratios

    times = {"dense": [1.0, 2.0, 40.0], "pruned": [0.5, 1.0, 20.0]}
    found = {"flops": {"dense": 8.0, "pruned": 4.0}, "ratios": {"cost": ["pruned", "dense"]}}
    told = ratios(found, {name: quartiles(taken) for name, taken in times.items()}, times)
    assert told["within_rounds"]["speedup_ratio"] == {"median": 1.0, "q1": 1.0, "q3": 1.0, "min": 1.0}
    assert told["within_rounds"]["cost"]["median"] == told["cost"] == 0.5


def test_bench_finds_the_family_of_a_method_that_only_one_family_has(vit_folder):
    words = ["bench", vit_folder, "--method", "tome", "--keep", "0.6", "--rounds", "1", "--json"]
    result = json.loads(call(*words).stdout)["results"][0]
    assert result["family"] == "vit"
    assert set(result["seconds"]) == {"dense", "pruned", "scoring"}
    assert result["peak_memory_mb_dense"] > 0
    assert result["protocol"]["attention"] == "sdpa"
    with pytest.raises(
        UserError, match="--method random does not tell the family; write tprune bench FAMILY"
    ):
        call("bench", vit_folder, "--method", "random", "--keep", "0.6")
