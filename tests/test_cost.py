import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tprune.evaluate import cost
from tprune.evaluate.cost import flops, peak_heap, peak_tensors

MEGABYTE = 2**18
"""Float32 entries of one."""


def test_the_peak_of_tensors_is_what_was_alive_together():
    def run():
        first = torch.empty(2 * MEGABYTE)
        del first
        return torch.empty(MEGABYTE), torch.empty(2 * MEGABYTE)

    assert abs(peak_tensors(run, "cpu") - 3) < 0.01


def test_tensors_mapped_from_files_of_the_journal_are_no_memory(tmp_path):
    save_file({"mask": torch.zeros(3 * MEGABYTE)}, tmp_path / "block.safetensors")

    def run():
        return load_file(tmp_path / "block.safetensors"), torch.empty(MEGABYTE)

    assert abs(peak_tensors(run, "cpu") - 4) < 0.01
    assert abs(peak_tensors(run, "cpu", tmp_path) - 1) < 0.01


def test_the_peak_of_the_heap_counts_every_thread():
    def hold(worker):
        held = torch.empty(10 * MEGABYTE)
        met.wait()
        torch.ones(1024, 1024).matmul(torch.ones(1024, 1024))
        return len(held)

    met = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        peak = peak_heap(lambda: list(pool.map(hold, range(2))))
    assert math.isnan(peak) or peak > 19


def test_a_c_library_that_does_not_tell_what_is_in_use_runs_all_the_same(monkeypatch):
    def silent():
        raise AttributeError("mallinfo2")

    ran = []
    monkeypatch.setattr(cost, "in_use", silent)
    assert math.isnan(peak_heap(lambda: ran.append(True)))
    assert ran == [True]


@pytest.mark.parametrize(("name", "products"), [("deit_small", 4.61e9), ("vit_base", 17.58e9)])
def test_known_models_have_their_known_multiplications(name, products):
    with torch.device("meta"):
        model, image = timm.create_model(f"{name}_patch16_224").eval(), torch.empty(1, 3, 224, 224)
    assert flops(lambda: model(image)) / 2 == pytest.approx(products, rel=0.01)
