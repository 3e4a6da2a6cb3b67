"""Fits by several processes that `torchrun` or `accelerate launch` started."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.test_cli import call
from tprune import artifact
from tprune.errors import UserError
from tprune.pipelines.fit import processes


def test_two_processes_learn_what_one_does_and_one_of_them_writes_it(vit_folder, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    asked = [
        "vit",
        "--method",
        "mstm",
        "--keep",
        "0.6",
        "--fit",
        "built-in",
        "--set",
        "epochs=0.0039",
        "--set",
    ]
    asked += ["batch=4", vit_folder, "--no-eval", "--batch-size", 1, "--limit", 1, "--json", "--out"]
    call(*asked, one)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    words = [*launcher, "-m", "tprune.cli", *asked, two]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["fit"]["steps"] == 2
    before, alone, together = (
        artifact.read_tensors(folder / "model.safetensors") for folder in (vit_folder, one, two)
    )

    def apart(first, second):
        return sum((first[name] - second[name]).square().sum() for name in first).sqrt()

    assert apart(together, alone) < 1e-3 * apart(alone, before)


def test_a_step_must_divide_among_the_processes(monkeypatch, vit):
    monkeypatch.setattr("tprune.pipelines.fit.Accelerator", lambda **words: SimpleNamespace(num_processes=3))
    with pytest.raises(UserError, match="--set batch=16: does not divide among 3 processes"):
        processes(vit, 16)
