"""The registry and the contract of a method's hyperparameters."""

import json

import pytest
from click.testing import CliRunner

import tprune
from tprune.cli import command
from tprune.errors import UserError
from tprune.methods import registry
from tprune.methods.tokens import Shape

FACTS = registry.facts()


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: f"{fact.family}/{fact.id}")
def test_the_facts_read_from_source_are_those_of_the_class(fact):
    kind = registry.load(fact.id, fact.family)
    assert kind.paper == fact.paper
    assert (kind.kind, kind.learns, kind.built_in) == (fact.kind, fact.learns, fact.built_in)
    fields = {field.name: field for field in kind.hyperparameters()}
    assert list(fields) == [parameter.name for parameter in fact.parameters]
    for parameter in fact.parameters:
        assert fields[parameter.name].metadata["help"] == parameter.help
        assert getattr(kind(), parameter.name) == parameter.default
    assert fact.summary
    assert fact.paper.checked in ("code", "port", "paper", "abstract")


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: f"{fact.family}/{fact.id}")
def test_a_method_checked_against_code_has_golden_values(fact):
    from tests.golden_values import HERE

    if fact.paper.checked in ("code", "port"):
        assert (HERE / fact.family / f"{fact.id}.json").exists()


def test_the_api_lists_the_same():
    assert tprune.methods("vit") == registry.facts("vit")


def test_an_id_of_several_families_must_say_which():
    with pytest.raises(UserError, match="several families have 'random'; say which: vit/random"):
        registry.find("random")
    assert registry.find("vit/random").family == "vit"


def test_an_unknown_method_or_family_names_the_known():
    with pytest.raises(UserError, match="there are: .*evit, .*random, .*tome, .*zero-tprune"):
        registry.find("nonsense", "vit")
    with pytest.raises(UserError, match="no family 'cnn'"):
        registry.facts("cnn")


def test_hyperparameters_are_typed_and_bounded():
    assert registry.build("tome", "vit", {"r": "16,8"}).r == (16, 8)
    assert registry.build("tome", "vit", {"prop-attn": "false"}).prop_attn is False
    for settings, clue in (
        ({"r": "a"}, "expected"),
        ({"r": 2.5}, "expected"),
        ({"r": -1}, "expected 0 to inf"),
        ({"inflect": float("nan")}, "expected -1 to 1"),
    ):
        with pytest.raises(UserError, match=clue):
            registry.build("tome", "vit", settings)


def test_a_method_of_another_package_joins_by_its_entry_point(tmp_path, monkeypatch):
    import importlib.metadata

    source = registry._sources
    (tmp_path / "their_method.py").write_text(
        next(path for _, name, _, path in source() if name == "tome").read_text()
    )
    monkeypatch.syspath_prepend(tmp_path)
    entry = importlib.metadata.EntryPoint("vit/theirs", "their_method", registry.ENTRY_POINTS)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry])
    monkeypatch.setattr(registry, "_sources", source.__wrapped__)
    assert registry.find("theirs").module == "their_method"
    assert registry.build("theirs", settings={"r": 3}).id == "theirs"


ANSWERS = {
    "dit-routing": ("vit", "vit/diffrate"),
    "adatoken-3d": ("vlm", "--method fastv"),
    "gap": ("vlm", "--positions gap"),
    "uniprunebench": ("vlm", "--grid recipes/vlm/uniprunebench.grid"),
    "p2-law": ("llm-weights", "tprune predict-recovery"),
    "sentinel-tokens": ("llm-context", "llm-context/streaming-llm"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_paper_that_is_no_method_is_answered_and_never_run(name):
    family, piece = ANSWERS[name]
    call = CliRunner().invoke
    told = call(command, ["methods", name]).output
    entry = json.loads(call(command, ["methods", family, name, "--json"]).output)
    assert entry["kind"] == "not a method"
    assert piece in entry["piece"]
    for fact in (
        entry["kind"],
        entry["why"],
        entry["piece"],
        entry["paper"]["title"],
        entry["paper"]["arxiv"],
    ):
        assert fact in told
    listed = [line for line in call(command, ["methods", family]).output.splitlines() if f" {name} " in line]
    assert len(listed) == 1
    assert "not a method" in listed[0]

    budget = "--sparsity" if family == "llm-weights" else "--keep"
    result = call(command, [family, "--method", name, budget, "0.5"], standalone_mode=False)
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == (
        f"{family}/{name} is not a method: {entry['why']}; what can be used of it is {entry['piece']}"
    )


def test_every_answer_is_tested_and_none_is_a_method():
    answers = {entry.id for entry in registry.entries() if isinstance(entry, registry.Answer)}
    assert answers == set(ANSWERS)
    assert not answers & {fact.id for fact in FACTS}


def test_the_changelog_tells_what_every_method_is_checked_against():
    from pathlib import Path

    text = (Path(__file__).parents[1] / "CHANGELOG.md").read_text()
    for fact in FACTS:
        assert f"| `{fact.family}/{fact.id}` |" in text


def test_lists_of_values_that_are_too_long_or_do_not_match_are_refused():
    with pytest.raises(UserError, match="--set layers=8,9,10: expected 2 values"):
        registry.build("feather", "vlm", {"layers": "8,9,10"})
    with pytest.raises(UserError, match="pyramiddrop: 3 layers and 1 ratios"):
        registry.build("pyramiddrop", "vlm", {"ratios": 0.5}).stages(Shape(32, 576), None)


def test_with_a_budget_the_data_no_longer_decides_how_many_stay():
    kinds = [registry.load(fact.id, fact.family) for fact in FACTS if fact.family in ("vit", "vlm")]
    for kind in kinds:
        if kind.under_keep:
            assert kind().varies()
            assert not kind().counted().varies()
            assert kind().counted().settings() == kind().settings() | kind.under_keep


@pytest.mark.parametrize(
    ("name", "given"), [("vlm/longtail", "counts=keep"), ("vit/bavit", "threshold=none")]
)
def test_without_a_budget_something_says_how_many_stay(name, given):
    method = registry.build(name, settings=dict([given.split("=")]))
    with pytest.raises(
        UserError, match=f"{method.id}: --set {given} leaves the numbers to --keep; give it a budget"
    ):
        method.stages(Shape(24, 576), None)
