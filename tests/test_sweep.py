"""`tprune sweep`: a grid under one protocol, resumed, grouped, drawn, and told on a page."""

import csv
import json
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from tests.test_cli import call
from tests.test_recipe import RECIPES
from tprune.errors import UserError
from tprune.evaluate import page, plots, points
from tprune.pipelines import grid, trials
from tprune.progress import Progress
from tprune.recipe import ModelSource, Recipe, Stage


def sweep(model, out, *words, family="vit"):
    small = ("--limit", 8, "--batch-size", 4, "--no-latency") if family == "vit" else ("--no-latency",)
    return call("sweep", family, model, *small, "--out", out, *words)


def rows(out):
    return list(csv.DictReader((out / "table.csv").open()))


def stored(out):
    return {file.name: json.loads(file.read_text()) for file in (out / "points").glob("*.json")}


@pytest.fixture(scope="module")
def swept(vit_folder, tmp_path_factory):
    """Two methods and the floor at a budget that one of them cannot reach and one that all can."""
    out = tmp_path_factory.mktemp("sweep") / "vit"
    result = sweep(vit_folder, out, "--method", "tome,evit", "--keep", "0.6,0.3", "--seeds", 2)
    assert result.exit_code == 0
    return out, result


def test_every_method_and_the_floor_are_measured_at_every_budget(swept):
    out, _ = swept
    found = {(row["method"], row["budget"]): row for row in rows(out)}
    assert set(found) == {
        (method, f"keep {keep}") for method in ("tome", "evit", "random") for keep in (0.6, 0.3)
    }
    assert float(found["tome", "keep 0.6"]["achieved"]) == pytest.approx(0.6, abs=0.02)
    assert float(found["tome", "keep 0.6"]["flops"]) < 1


def test_an_unreachable_budget_is_a_row_with_the_floor_of_the_method(swept):
    out, result = swept
    row = next(row for row in rows(out) if row["method"] == "evit" and row["budget"] == "keep 0.3")
    assert row["status"] == "unreachable"
    assert row["quality"] == ""
    point = next(point for point in stored(out).values() if point["status"] == "unreachable")
    assert 0.3 < point["reach"][0] < 0.6
    assert f"reaches {point['reach'][0]:.3g} to 1" in result.stdout


def test_the_table_on_the_screen_has_dense_floor_and_every_method(swept):
    text = swept[1].stdout
    for word in ("dense", "tome", "evit", "floor", "FLOPs", "agreement", "report.html"):
        assert word in text
    assert "\x1b" not in text


def test_seeds_become_a_mean_and_a_deviation(swept):
    out, _ = swept
    row = next(row for row in rows(out) if row["method"] == "random" and row["budget"] == "keep 0.3")
    measured = [
        point["pruned"]["accuracy"]
        for point in stored(out).values()
        if point["method"] == "random" and point["asked"] == {"keep": 0.3}
    ]
    assert len(measured) == int(row["seeds"]) == 2
    assert float(row["quality"]) == pytest.approx(sum(measured) / 2)
    assert float(row["spread"]) == pytest.approx(abs(measured[0] - measured[1]) / 2**0.5)


def test_methods_that_draw_nothing_are_measured_with_one_seed(swept):
    assert {(row["method"], row["seeds"]) for row in rows(swept[0]) if row["status"] == "ok"} == {
        ("tome", "1"),
        ("evit", "1"),
        ("random", "2"),
    }


def test_every_point_carries_its_whole_protocol_and_its_recipe(swept):
    from tprune import recipe

    for point in stored(swept[0]).values():
        protocol = point["protocol"]
        assert {"family", "model", "data", "seed", "dtype", "batch_size", "device"} <= set(protocol)
        assert {"cpu", "cores", "threads"} <= set(protocol["hardware"])
        assert {"tprune", "torch", "transformers", "timm", "python"} <= set(protocol["software"])
        assert protocol["data"]["sha256"]
        assert protocol["seed"] == point["seed"]
        import yaml

        again = recipe.parse(yaml.safe_load(point["recipe"]))
        assert again.stage.method == point["method"]
        assert again.seed == point["seed"]


def test_a_sweep_that_was_killed_goes_on_and_measures_only_what_is_missing(vit_folder, tmp_path, monkeypatch):
    measured, figures = [], trials.Trials.figures

    def dies(self, trial, reference):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(trial.recipe.stage.method)
        return figures(self, trial, reference)

    monkeypatch.setattr(trials.Trials, "figures", dies)
    words = ("--method", "tome,evit,zero-tprune", "--keep", "0.6")
    assert sweep(vit_folder, tmp_path / "out", *words).exit_code == 1
    assert len(stored(tmp_path / "out")) == 2
    assert not list((tmp_path / "out" / "points").glob(".*"))
    first = measured.copy()
    measured.clear()
    sweep(vit_folder, tmp_path / "out", *words)
    assert sorted(first + measured) == ["evit", "random", "tome", "zero-tprune"]


def test_the_dense_model_is_measured_once_for_all_sweeps_of_a_folder(vit_folder, tmp_path, monkeypatch):
    calls, dense = [], trials.Trials.dense
    monkeypatch.setattr(trials.Trials, "dense", lambda self: calls.append(1) or dense(self))
    sweep(vit_folder, tmp_path / "out", "--method", "tome", "--keep", "0.6,0.8")
    sweep(vit_folder, tmp_path / "out", "--method", "evit", "--keep", "0.6")
    assert len(calls) == 1
    assert {row["method"] for row in rows(tmp_path / "out")} == {"tome", "evit", "random"}


def test_a_second_sweep_measures_nothing_twice_unless_forced(vit_folder, tmp_path, monkeypatch):
    calls, figures = [], trials.Trials.figures
    monkeypatch.setattr(
        trials.Trials, "figures", lambda self, *words: calls.append(1) or figures(self, *words)
    )
    words = ("--method", "tome", "--keep", "0.6")
    for extra, count in (((), 2), ((), 2), (("--force",), 4)):
        sweep(vit_folder, tmp_path / "out", *words, *extra)
        assert len(calls) == count


def test_points_equal_what_the_family_command_measures(vit_folder, swept):
    words = ("--method", "tome", "--keep", "0.6", "--limit", 8, "--batch-size", 4, "--json")
    alone = json.loads(call("vit", vit_folder, *words).stdout)
    point = next(p for p in stored(swept[0]).values() if p["method"] == "tome" and p["asked"]["keep"] == 0.6)
    for name in ("accuracy", "agreement", "flops"):
        assert point["pruned"][name] == alone["pruned"][name]
        assert point["dense"][name] == alone["dense"][name]
    assert point["protocol"] == alone["protocol"] | {"latency": None, "seed": point["seed"]}


def test_the_dense_model_is_as_it_was_after_weights_were_pruned(folder, text, tmp_path):
    words = ("--method", "magnitude,sparsegpt,gblm,flap,shortgpt", "--sparsity", "0.5", "--pattern", "2:4")
    small = ("--data", text, "--limit", 2, "--length", 24, "--calibration", 4, "--batch-size", 2)
    result = sweep(folder, tmp_path / "out", *words, *small, family="llm-weights")
    assert result.exit_code == 0, result.output
    found = stored(tmp_path / "out").values()
    good = [point for point in found if point["status"] == "ok"]
    assert len({point["dense"]["perplexity"] for point in good}) == 1
    assert {point["status"] for point in found} <= {"ok", "unfit", "unreachable"}
    alone = next(p for p in good if p["method"] == "magnitude" and p["asked"] == {"sparsity": 0.5})
    words = ("llm-weights", folder, "--method", "magnitude", "--sparsity", 0.5, *small)
    assert json.loads(call(*words, "--json").stdout)["pruned"]["perplexity"] == alone["pruned"]["perplexity"]
    assert alone["pruned"]["weight_mb"] < alone["dense"]["weight_mb"]
    structure = next(point for point in found if point["method"] == "flap" and "pattern" in point["asked"])
    assert "removes structure" in structure["reason"]


def test_a_method_that_breaks_is_a_failed_row_and_exit_code_1(vit_folder, tmp_path, monkeypatch):
    from tprune.methods.vit.tome import ToMe

    def broken(*words):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(ToMe, "reduce", broken)
    result = sweep(vit_folder, tmp_path / "out", "--method", "tome,evit", "--keep", "0.6")
    assert result.exit_code == 1
    assert {row["method"]: row["status"] for row in rows(tmp_path / "out")} == {
        "tome": "failed",
        "evit": "ok",
        "random": "ok",
    }
    assert "ZeroDivisionError: by zero" in result.output
    monkeypatch.undo()
    assert sweep(vit_folder, tmp_path / "out", "--method", "tome,evit", "--keep", "0.6").exit_code == 0


def test_what_a_trial_says_of_tokens_is_of_its_evaluation_and_not_of_the_noise_it_is_timed_on(vit_folder):
    base = Recipe(ModelSource(str(vit_folder)), (Stage("vit", "random", keep=0.6),), limit=8, batch_size=4)
    all_trials = trials.Trials(base, Progress(quiet=True))
    _, dense = all_trials.dense()
    stage = Stage("vit", "ltmp", set={"merge_threshold": 0.7, "prune_threshold": 0.005})
    with all_trials.pruned(replace(base, stages=(stage,))) as trial:
        all_trials.figures(trial, dense)
        told = trial.handle.entering
        with trial.handle.counting():
            all_trials.base.evaluate(trial.subject)
        assert trial.handle.entering == told
        all_trials.base.workload(trial.subject).run()
        assert trial.handle.driver.entering != told


def test_latency_is_measured_in_turn_with_the_dense_model_and_has_quartiles(vit_folder, tmp_path):
    small = ("--limit", 8, "--batch-size", 4, "--rounds", 3)
    out = tmp_path / "out"
    call("sweep", "vit", vit_folder, *small, "--method", "tome", "--keep", "0.6", "--out", out)
    for point in stored(out).values():
        for figures in (point["dense"], point["pruned"]):
            assert figures["latency_q1_ms"] <= figures["latency_ms"] <= figures["latency_q3_ms"]
        ratios = [point["pruned"][f"latency{part}_ratio"] for part in ("_q1", "", "_q3")]
        assert ratios == sorted(ratios)
        assert point["protocol"]["latency"] == {"rounds": 3}
    assert (out / "pareto-latency.png").exists()
    assert all(float(row["latency"]) > 0 for row in rows(out))


def test_methods_that_learn_are_fitted_with_every_seed_beside_those_that_are_not(vit_folder, tmp_path):
    few = ("--set", "epochs=0.002", "--set", "batch=4", "--keep", "0.6")
    sweep(vit_folder, tmp_path / "out", "--method", "tnt,tome", "--fit", "built-in", "--seeds", 2, *few)
    found = {(row["method"], row["settings"]): row["seeds"] for row in rows(tmp_path / "out")}
    assert found == {
        ("tnt", "epochs=0.002 batch=4 fit=built-in"): "2",
        ("tome", ""): "1",
        ("random", ""): "2",
    }
    with pytest.raises(UserError, match="--fit built-in: none of these methods learns"):
        sweep(vit_folder, tmp_path / "other", "--method", "tome", "--fit", "built-in", "--keep", "0.6")


def test_two_protocols_never_share_a_plot(vit_folder, swept, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(swept[0], out)
    call(
        "sweep",
        "vit",
        vit_folder,
        "--limit",
        4,
        "--no-latency",
        "--method",
        "tome",
        "--keep",
        "0.6",
        "--out",
        out,
    )
    assert {row["protocol"] for row in rows(out)} == {"1", "2"}
    assert (out / "pareto-flops.svg").exists()
    assert (out / "pareto-flops-2.svg").exists()
    text = (out / "report.html").read_text()
    assert "measured under 2 protocols" in text
    assert "data.sha256" in text
    assert "data.samples" in text
    assert "batch_size" in text
    latest = next(row for row in rows(out) if row["protocol"] == "1")
    assert latest["status"] == "ok"
    assert json.loads((out / "table.json").read_text())["protocols"][0]["data"]["samples"] == 4


def test_a_grid_file_crosses_settings_with_budgets(vit_folder, tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(
        "keep: [0.6]\nmethods:\n- evit\n"
        "- method: tome\n  set: {prop_attn: [true, false], inflect: 1}\n  keep: [0.5, 0.7]\n"
    )
    found = grid.read(str(file), "vit")
    assert len(found) == 5
    result = sweep(vit_folder, tmp_path / "out", "--grid", file)
    assert result.exit_code == 0
    names = {(row["method"], row["settings"], row["budget"]) for row in rows(tmp_path / "out")}
    assert ("tome", "prop_attn=False inflect=1", "keep 0.7") in names
    assert {("random", "", f"keep {keep}") for keep in (0.5, 0.6, 0.7)} < names


def test_costs_are_those_of_the_images_where_they_decide_how_much_stays(vit_folder, tmp_path):
    assert sweep(vit_folder, tmp_path / "out", "--method", "saint").exit_code == 0
    small = ("--limit", 8, "--batch-size", 4, "--json")
    alone = json.loads(call("vit", "--method", "saint", vit_folder, *small).stdout)
    point = next(point for point in stored(tmp_path / "out").values() if point["method"] == "saint")
    for model in ("dense", "pruned"):
        assert point[model]["flops"] == alone[model]["flops"]


def test_the_benchmark_of_vlm_methods_is_a_grid_of_three_budgets_with_a_floor_at_each():
    found = grid.with_floor(grid.read(str(RECIPES / "vlm" / "uniprunebench.grid"), "vlm"))
    budgets = [0.333, 0.222, 0.111]
    for method in ("fastv", "divprune", "pyramiddrop", "random"):
        assert [one.budget["keep"] for one in found if one.method == method] == budgets


def test_accuracy_on_each_kind_of_question_is_a_mean_over_seeds():
    def point(seed, what):
        figures = {"accuracy": 0.5, "accuracy_by_kind": {"what": what, "where": 0.25}, "flops": 1}
        return {
            "status": "ok",
            "family": "vlm",
            "method": "random",
            "set": {},
            "asked": {"keep": 0.5},
            "seed": seed,
            "recipe": "",
            "protocol": {"family": "vlm", "model": {"name": "m"}, "data": {}, "seed": seed},
            "budget": {"achieved": 0.5, "tokens": 9, "tokens_entering_mean": 4},
            "dense": figures | {"agreement": 1.0},
            "pruned": figures | {"agreement": 1.0},
        }

    found = points.groups([point(0, 0.5), point(1, 0.75)])
    assert points.as_rows(found)[0]["kinds"] == "what=0.6250 where=0.2500"


BAD = {
    "no methods": ((), "no methods"),
    "an unknown method": (("--method", "nonsense"), "no method 'nonsense'"),
    "a budget that is no number": (("--method", "tome", "--keep", "0.5,x"), "--keep x: expected numbers"),
    "a budget out of range": (("--method", "tome", "--keep", "0.5,7"), "--keep 7: expected a fraction"),
    "the other family's budget": (("--method", "tome", "--sparsity", "0.5"), "are for weights"),
    "a setting that nobody has": (
        ("--method", "tome", "--set", "x=1"),
        "none of tome has this hyperparameter",
    ),
    "a missing grid": (("--grid", "nowhere.yaml"), "--grid nowhere.yaml"),
    "seeds of a random model": (
        ("--method", "tome", "--seeds", 2, "--random-weights"),
        "the seed makes the model",
    ),
    "a missing data folder": (("--method", "tome", "--keep", "0.5", "--data", "nowhere"), "no such folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_the_whole_sweep_is_one_line(case, vit_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, clue = BAD[case]
    with pytest.raises(UserError, match=clue):
        sweep(vit_folder, tmp_path / "out", *words)


@pytest.mark.parametrize(
    ("text", "clue"),
    [
        ("methods: tome", "expected a mapping with 'methods'"),
        ("methods: [{set: {}}]", "is no method"),
        ("methods: [tome]\nkep: 0.5", "unknown key 'kep'"),
        ("methods: [tome]\nkeep: [half]", "'half' is no number"),
        ("methods: [", "not valid YAML"),
    ],
)
def test_a_grid_file_that_says_something_else_is_refused(text, clue, tmp_path):
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(UserError, match=clue):
        grid.read(str(tmp_path / "grid.yaml"), "vit")


class Page(HTMLParser):
    """The tags, links and ids of a page; complains about tags that are not closed."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.ids = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


PICTURES = {"keep 0.6": [("drawn", "<p class='drawn'>a picture</p>")]}


def test_the_page_is_whole_needs_no_network_and_shows_everything(swept, tmp_path):
    found = points.groups(list(stored(swept[0]).values()))
    text = page.page(found, PICTURES)
    parsed = Page(text)
    assert parsed.tags.count("svg") == 2
    assert all(link.startswith(("#", "data:")) for link in parsed.links)
    assert len(parsed.ids) == len(set(parsed.ids))
    for word in ("unreachable", "prefers-color-scheme: dark", "tprune: 1", "a picture", "random"):
        assert word in text
    assert text.count("<details>") == len(found[0].rows) + 1
    assert text.count("<details open>") == 1
    file = tmp_path / "report.html"
    file.write_text(text)
    for browser in filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        check_in(browser, file, len(found[0].rows))


def check_in(browser, file, count):
    """Load the page, sort the table by its fourth column, choose a method, and look at what became of it."""
    script = """<script>
    const say = text => document.body.setAttribute("data-seen", text);
    onload = () => {
      document.querySelectorAll("th button")[3].click();
      const values = [...document.querySelectorAll("tbody tr[data-series]")].map(row => row.cells[3].dataset.value);
      const real = values.filter(value => value !== "").map(Number);
      document.querySelector(".looks button").click();
      const faint = [...document.querySelectorAll("svg [id*='-of-']")].filter(one => one.style.opacity == .12);
      say([values.length, real.every((value, i) => !i || real[i - 1] <= value), values.at(-1) === "", faint.length > 0,
        document.documentElement.scrollWidth <= innerWidth].join());
    };
    </script>"""
    tried = file.with_name("tried.html")
    tried.write_text(file.read_text().replace("</body>", script + "</body>"))
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900"]
    profile = f"--user-data-dir={file.parent / 'profile'}"
    done = subprocess.run(
        [*words, profile, "--dump-dom", tried.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert f'data-seen="{count},true,true,true,true"' in done.stdout


def test_methods_are_told_apart_in_a_plot_of_many():
    names = [f"method-{place}" for place in range(60)]
    looks = plots.looks([*names, "random"])
    assert len(set(looks.values())) == 61
    assert looks["random"].colour == plots.GRAY


def test_a_cost_that_no_method_changes_is_not_drawn(swept):
    found = points.groups(list(stored(swept[0]).values()))[0]
    assert found.cost("flops") is None
    assert found.cost("latency") == "not measured"


def test_the_front_is_what_nothing_beats_in_both():
    def row(quality, cost):
        return points.Row("m", "", "keep 0.5", 0.5, "ok", quality=quality, flops=cost)

    cheap, good, beaten = row(0.5, 0.3), row(0.9, 0.7), row(0.5, 0.7)
    rows = [cheap, good, beaten]
    assert [points._with_front(one, rows, False).front for one in rows] == [("flops",), ("flops",), ()]
    assert points._with_front(beaten, rows, True).front == ()
    assert points._with_front(cheap, rows, True).front == ("flops",)


def test_methods_of_text_encoders_have_a_built_in_model_of_their_own_and_no_floor(tmp_path):
    words = (
        "--method",
        "ltp",
        "--set",
        "final_threshold=0.01",
        "--limit",
        4,
        "--no-latency",
        "--no-pictures",
    )
    assert call("sweep", "llm-context", *words, "--out", tmp_path / "out").exit_code == 0
    (point,) = stored(tmp_path / "out").values()
    assert (point["model"], point["status"]) == ("minilm-topics", "ok")
    with pytest.raises(UserError, match="is a text encoder, where random does not work; use ltp, top"):
        call("sweep", "llm-context", "minilm-topics", "--method", "snapkv", "--out", tmp_path / "other")
