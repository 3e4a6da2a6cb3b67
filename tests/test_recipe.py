import shlex
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tprune import recipe
from tprune.cli import command
from tprune.errors import UserError
from tprune.methods import registry
from tprune.pipelines.run import pipelines
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe, Stage

RECIPES = Path(__file__).parents[1] / "recipes"
FILES = sorted(RECIPES.rglob("*.yaml"))

names = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)
stages = st.builds(
    Stage,
    st.sampled_from(["vit", "vlm", "llm-context"]),
    names,
    keep=st.one_of(st.none(), st.floats(0.01, 1)),
    set=st.dictionaries(names, st.one_of(st.integers(), st.booleans(), names), max_size=2),
)
recipes = st.builds(
    Recipe,
    st.builds(ModelSource, names, random_weights=st.booleans()),
    st.lists(stages, min_size=1, max_size=2).map(tuple),
    seed=st.integers(0, 9),
    limit=st.one_of(st.none(), st.integers(1, 99)),
)


@given(recipes)
def test_yaml_says_everything_a_recipe_holds(given_recipe):
    import yaml

    assert recipe.parse(yaml.safe_load(given_recipe.to_yaml())) == given_recipe


def test_the_key_changes_with_the_seed_and_not_with_the_paper_block():
    one = Recipe(ModelSource("m"), (Stage("vit", "tome", keep=0.5),))
    assert one.key() == Recipe(one.model, one.stages, paper={"title": "x"}).key()
    assert one.key() != Recipe(one.model, one.stages, seed=1).key()


@pytest.mark.parametrize(
    ("text", "clue"),
    [
        ("nonsense: [", "not valid YAML"),
        ("just a word", "expected a mapping"),
        ("model: x\nstages: []", "no 'tprune: 1' line"),
        ("tprune: 9\nmodel: x\nstages: []", "version 9 is newer"),
        ("tprune: 0\nmodel: x\nstages: []", "version 0 is none"),
        ("tprune: 1\nmodel: x\nlimit: -3\nstages: [{family: vit, method: tome}]", "limit: -3: expected 1 or"),
        ("tprune: 1\nmodel: x\nbatch_size: 0\nstages: [{family: vit, method: tome}]", "batch_size: 0"),
        ("tprune: 1\nmodel: x", "'model' and 'stages' are required"),
        ("tprune: 1\nmodel: x\nstages: []", "at least one stage"),
        ("tprune: 1\nmodel: x\nstages: [{family: vit}]", "missing method"),
        ("tprune: 1\nmodel: x\nflavour: 3\nstages: [{family: vit, method: tome}]", "unknown key 'flavour'"),
        ("tprune: 1\nmodel: x\nseed: often\nstages: [{family: vit, method: tome}]", "seed: 'often'"),
        ("tprune: 1\nmodel: x\nstages: [{family: vit, method: tome, keep: lots}]", "keep: 'lots'"),
    ],
)
def test_a_bad_recipe_says_what_is_wrong(text, clue, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        recipe.read(file)
    assert clue in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_recipe_is_named():
    with pytest.raises(UserError, match="cannot read recipe nowhere.yaml"):
        recipe.read("nowhere.yaml")


@pytest.mark.parametrize("text", ["4:2", "0:4", "2-4", "2:4:8", ":4"])
def test_a_bad_pattern_is_refused(text):
    with pytest.raises(UserError, match=f"--pattern {text}"):
        recipe.pattern(text)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_recipe_dry_runs(file):
    result = CliRunner().invoke(command, ["run", str(file), "--dry-run"], catch_exceptions=False)
    assert "would prune" in result.output


def test_every_method_has_a_recipe_named_after_it_with_its_paper():
    for fact in registry.facts():
        read = recipe.read(RECIPES / fact.family / f"{fact.id}.yaml")
        assert (read.stage.family, read.stage.method) == (fact.family, fact.id)
        assert read.paper["title"] == fact.paper.title
        assert read.paper["setting"]
        assert read.paper["reported"]


@pytest.mark.parametrize("file", sorted((RECIPES / "vit").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_vit_recipe_tells_the_papers_figures_and_a_command_that_checks_them(
    file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("VIM_S.safetensors").touch()
    paper = recipe.read(file).paper
    for told in (paper, paper.get("measured_by_others", paper)):
        assert told["setting"]
        assert told["reported"]
        name, *options = shlex.split(told["command"])
        assert name == "tprune"
        result = CliRunner().invoke(command, [*options, "--dry-run"], catch_exceptions=False)
        assert f"with vit {file.stem} " in result.output


@pytest.mark.parametrize(
    ("families", "given", "clue"),
    [
        (["vit"], {"length": 8}, "--length 8: images .* in vit; leave it out"),
        (["vlm"], {"calibration": 8}, "--calibration 8: no method is calibrated in vlm"),
        (["llm-context", "vlm"], {"calibration": 8}, "--calibration 8: .* in vlm"),
        (["vlm", "llm-weights"], {"calibration": 8, "length": 8}, None),
        (["llm-context"], {"length": 8}, None),
    ],
)
def test_what_no_stage_reads_is_refused_in_recipes_and_in_python_too(families, given, clue):
    method = {"vit": "tome", "vlm": "fastv", "llm-context": "snapkv", "llm-weights": "wanda"}
    stages = tuple(Stage(family, method[family]) for family in families)
    ask = partial(pipelines, Recipe(ModelSource("m"), stages, **given), Progress(quiet=True))
    if clue is None:
        assert len(ask()) == len(families)
        return
    with pytest.raises(UserError, match=clue):
        ask()
