"""Recipes of several stages, and folders of recipes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import tprune
from tprune.cli import command
from tprune.recipe import ModelSource, Recipe, Stage

RECIPES = Path(__file__).parents[1] / "recipes"


def test_weights_and_cache_compose_in_one_recipe(folder, text, tmp_path):
    stages = (
        Stage("llm-weights", "wanda", sparsity=0.5),
        Stage("llm-context", "streaming-llm", keep=0.5, set={"sink": 2}),
    )
    recipe = Recipe(
        ModelSource(str(folder)), stages, data=str(text), calibration=4, length=32, limit=2, batch_size=2
    )
    (tmp_path / "both.yaml").write_text(recipe.to_yaml())
    words = ["run", str(tmp_path / "both.yaml"), "--out", str(tmp_path / "out"), "--json"]
    report = json.loads(CliRunner().invoke(command, words, catch_exceptions=False).stdout)
    assert report["kind"] == "wrapped"
    assert report["method"] == "streaming-llm"
    assert report["pruned"]["cache_mb"] < report["dense"]["cache_mb"]
    model = tprune.load(tmp_path / "out")
    weight = model.model.layers[0].mlp.gate_proj.weight
    assert (weight == 0).float().mean() >= 0.5
    again = CliRunner().invoke(
        command,
        ["run", str(tmp_path / "out" / "recipe.yaml"), "--out", str(tmp_path / "again"), "--quiet"],
        catch_exceptions=False,
    )
    assert again.exit_code == 0
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    assert torch.isfinite(load_file(tmp_path / "out" / "probe.safetensors")["output"]).all()


def test_a_folder_of_recipes_runs_as_a_script_and_skips_what_is_done(vit_folder, tmp_path):
    recipes, out = tmp_path / "recipes", tmp_path / "out"
    recipes.mkdir()
    recipe = Recipe(ModelSource(str(vit_folder)), (Stage("vit", "tome", keep=0.6),), limit=4, batch_size=4)
    (recipes / "tome.yaml").write_text(recipe.to_yaml())
    (recipes / "wrong.yaml").write_text("tprune: 1\nmodel: x\nstages: [{family: vit, method: nonsense}]")
    script = tmp_path / "reproduce.sh"
    shutil.copy(RECIPES / "reproduce.sh", script)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def reproduce():
        words = ["bash", str(script), str(recipes), str(out)]
        return subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PATH": path})

    first = reproduce()
    assert first.returncode == 1
    assert "wrong: failed" in first.stderr
    assert json.loads((out / "tome.json").read_text())["method"] == "tome"
    assert (out / "tome" / "report.json").exists()
    assert not list(out.glob("wrong*"))
    second = reproduce()
    assert "tome: done already" in second.stdout
    nothing = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert nothing.returncode == 2
