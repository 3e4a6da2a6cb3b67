"""`tprune compare`: protocols first, then figures."""

import json

import pytest

from tests.test_cli import call
from tprune.errors import UserError
from tprune.evaluate.protocol import differing, fingerprint, incomparable


@pytest.fixture(scope="module")
def folders(vit_folder, tmp_path_factory):
    """Three artifacts: two of one protocol, one of fewer samples."""
    place = tmp_path_factory.mktemp("compare")
    for name, method, limit in (("a", "tome", 8), ("b", "evit", 8), ("c", "tome", 4)):
        words = ("--method", method, "--keep", "0.6", "--limit", limit, "--batch-size", 4, "--quiet")
        call("vit", vit_folder, *words, "--out", place / name)
    return place


def test_equal_protocols_are_said_to_be_equal_and_figures_stand_side_by_side(folders):
    text = call("compare", folders / "a", folders / "b").stdout
    assert "the protocols are equal in every field" in text
    assert "not comparable" not in text
    assert next(line for line in text.splitlines() if line.split()[:1] == ["method"]).split() == [
        "method",
        "tome",
        "evit",
    ]
    assert "points" in text
    assert "FLOPs" in text


def test_other_data_are_named_before_any_figure_and_bar_the_comparison(folders):
    text = call("compare", folders / "a", folders / "c").stdout
    assert text.index("data.samples") < text.index("accuracy")
    assert "not comparable in quality: data.samples, data.sha256 differ" in text
    row = next(line for line in text.splitlines() if line.strip().startswith("accuracy"))
    assert row.strip().endswith("not comparable")
    flops = next(line for line in text.splitlines() if line.strip().startswith("FLOPs"))
    assert "not comparable" not in flops


def test_json_holds_differences_verdict_and_figures(folders):
    found = json.loads(call("compare", folders / "a", folders / "c" / "report.json", "--json").stdout)
    assert found["comparable"] == {"quality": False, "speed": True}
    assert found["protocol"]["data.samples"] == [8, 4]
    assert found["figures"]["achieved"][0] == found["figures"]["achieved"][1]


def test_points_of_a_sweep_can_be_compared_but_not_those_without_figures(vit_folder, tmp_path):
    words = ("--method", "evit", "--keep", "0.6,0.3", "--limit", 8, "--batch-size", 4, "--no-latency")
    call("sweep", "vit", vit_folder, *words, "--out", tmp_path / "out")
    points = {}
    for file in (tmp_path / "out" / "points").glob("*.json"):
        point = json.loads(file.read_text())
        points[point["method"], point["asked"]["keep"]] = file
    assert "equal in every field" in call("compare", points["evit", 0.6], points["random", 0.6]).stdout
    with pytest.raises(UserError, match=r"has no figures: it is unreachable \(--keep 0.3"):
        call("compare", points["evit", 0.3], points["random", 0.3])


@pytest.mark.parametrize("content", ["nonsense", "{}", "[1]"])
def test_what_is_no_report_is_refused(content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match="give an output folder"):
        call("compare", tmp_path / "x.json", tmp_path / "x.json")
    with pytest.raises(UserError, match="No such file"):
        call("compare", tmp_path / "nowhere", tmp_path / "x.json")


def test_another_machine_bars_times_and_not_quality():
    one = {"data": {"sha256": "1"}, "hardware": {"cpu": "a", "threads": 2}, "seed": 0}
    other = {"data": {"sha256": "1"}, "hardware": {"cpu": "b", "threads": 2}, "seed": 1}
    differences = differing([one, other])
    assert differences == {"hardware.cpu": ["a", "b"], "seed": [0, 1]}
    assert incomparable(differences) == {"quality": [], "speed": ["hardware.cpu"]}


def test_a_field_that_only_one_protocol_has_differs():
    assert differing([{"a": 1}, {"a": 1, "b": {"c": 2}}]) == {"b.c": [None, 2]}


def test_the_fingerprint_of_a_model_changes_with_its_weights(vit):
    before = fingerprint(vit)
    assert fingerprint(vit) == before
    vit.head.bias.data[-1] += 1
    assert fingerprint(vit) != before
